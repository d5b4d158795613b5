"""What is done to the data: which units take part, how far each is clipped, and what noise hides it."""
