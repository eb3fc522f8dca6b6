"""What the commands do: a module each, whose ``run`` takes a resolved configuration."""
