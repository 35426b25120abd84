"""What dev.py is made of, lowest first: process, environment, server, commands. Standard library only."""
