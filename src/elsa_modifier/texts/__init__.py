"""Text of the user's: files or the hub, to windows of tokens on disk. See docs/data.md."""
