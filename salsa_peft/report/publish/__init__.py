"""Publishing a run's results on the Hub, each with its model card."""
