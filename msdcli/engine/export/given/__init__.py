"""Files that travel with an export as they are: they import nothing of msd and run where it is not installed."""
