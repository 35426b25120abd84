"""What steers a picture beside the prompt."""
