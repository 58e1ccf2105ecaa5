"""Rewards for stories: two by the sentiment lexicon of TextBlob (pip install 'salsa-peft[sentiment]'), and brevity.

A reward function has the signature of TRL's reward functions: it is called with keyword arguments (`prompts`,
`completions`, the columns of the data …) and returns a number for each completion. In a recipe:

    reward: [../examples/sentiment_reward:sentiment, {model: ../examples/sentiment_reward:gold, weight: 0}]

PPO maximizes `sentiment`. `gold` has weight 0: it is only measured, to show whether more reward is also a better story.
"""

from textblob import TextBlob

PENALTY = 5.0
"""What a text that only repeats itself loses."""


def sentiment(completions, **_):
    """The sum of the polarities, from −1 to 1 each, of the words that the lexicon knows (happy: 0.8, sad: −0.5)."""
    return [float(sum(polarity for _, polarity in polarities(completion))) for completion in completions]


def gold(completions, **_):
    """The same with each different word counted once, less a penalty for repetition. PPO does not see it."""
    return [
        float(sum(dict(polarities(completion)).values())) - PENALTY * repetition(text_of(completion))
        for completion in completions
    ]


def brevity(completions, **_):
    """5 for an empty text, and 1 less for every 32 characters. It opposes `sentiment`, which grows with every happy word."""
    return [5 - len(text_of(completion)) / 32 for completion in completions]


def polarities(completion):
    """The words of a completion that the lexicon knows, with their polarities ("not good" is one, of −0.35)."""
    found = TextBlob(text_of(completion)).sentiment_assessments.assessments
    return [(" ".join(words), polarity) for words, polarity, *_ in found]


def repetition(text):
    """Share of a text's sequences of three words that have occurred in it before, from 0 to 1."""
    words = text.lower().split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def text_of(completion):
    """A completion's text. If the prompts are messages, a completion is a list of one message."""
    return completion if isinstance(completion, str) else completion[0]["content"]
