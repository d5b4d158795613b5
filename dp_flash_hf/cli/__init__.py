"""`dp-flash`, the command line: one file per command, `main` that assembles them, `common` that they share."""
