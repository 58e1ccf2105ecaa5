"""The models that `salsa judge` compares: finding them, their answers, and scores of the answers."""
