"""Guards: alarms on PPO's metrics if training goes wrong. Imports no torch."""
