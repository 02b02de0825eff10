"""What a prefix is and where prefixes live. Imports neither the server nor the trainer."""
