"""Judges that compare pairs of answers: an OpenAI endpoint, a local model, the reward, a function."""
