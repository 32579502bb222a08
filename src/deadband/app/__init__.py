"""The command line, the demo, and models by folder or name."""
