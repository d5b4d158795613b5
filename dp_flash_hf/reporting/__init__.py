"""What a training guarantees, said to people and to programs."""
