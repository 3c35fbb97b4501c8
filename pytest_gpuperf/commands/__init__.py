"""What the `gpuperf` command can do: one function a command, registered in `cli`."""
