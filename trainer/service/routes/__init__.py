"""The routes of the trainer's API."""
