"""The training task: student and bridges in one module, the losses, and the schedule of the alignment's weight."""
