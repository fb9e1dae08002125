"""How is a network trained? Jobs and their tasks, ranks, the engine, the loop, the optimizer state, monitoring, validation."""
