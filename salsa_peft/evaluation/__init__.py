"""The models' answers, their scores, and comparisons of the models by reward or by a judge."""
