"""`dp-flash`, the command line: one file per command, `main` that puts them together, `common` that they share."""
