"""Pictures with words: sheets, diagrams and the letters on them."""
