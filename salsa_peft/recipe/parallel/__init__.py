"""Several replicates at the same time: their processes, their output, and the machine's memory."""
