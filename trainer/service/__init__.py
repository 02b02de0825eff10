"""The trainer service: the HTTP API, the workers behind it, and the processes that train."""
