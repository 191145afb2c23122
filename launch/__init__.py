"""The `tubelet` command: everything a user types, and the demo."""
