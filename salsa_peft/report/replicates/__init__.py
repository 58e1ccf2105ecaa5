"""What several runs of one recipe found together: intervals over replicates, and the table of the paper's claims."""
