"""Who calls the library: `Trainer` and TRL's trainers, loops with Accelerate, and the checkpoints they write."""
