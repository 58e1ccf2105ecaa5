"""vLLM's engine for the rollout, with merged weights or with the policy's adapter."""
