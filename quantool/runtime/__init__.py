"""Child processes, the output folder, the terminal, the installed tools."""
