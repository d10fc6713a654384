"""The command line: flags, exit codes, signals and what is printed."""
