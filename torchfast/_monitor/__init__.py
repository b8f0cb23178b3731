"""VRAMMonitor, and what it is made of: the sources, the history, and the ways to look at it."""
