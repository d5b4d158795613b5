"""`dp-flash bench`: what private training and its attention cost on this machine, beside their peers."""
