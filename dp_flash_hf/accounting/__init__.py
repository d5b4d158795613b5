"""What training steps cost in privacy: plans before training, ledgers and spend logs of what was taken, and their epsilon."""
