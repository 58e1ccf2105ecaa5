"""Two rewards for stories, by the sentiment lexicon of TextBlob: pip install 'salsa-peft[sentiment]'.

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
    found = (TextBlob(text_of(completion)).sentiment_assessments.assessments for completion in completions)
    return [float(sum(polarity for _, polarity, *_ in words)) for words in found]


def gold(completions, **_):
    """The sentiment less a penalty for repetition, which PPO does not see."""
    return [
        score - PENALTY * repetition(text_of(completion))
        for score, completion in zip(sentiment(completions), completions, strict=True)
    ]


def repetition(text):
    """Share of a text's sequences of three words that have occurred in it before, from 0 to 1."""
    words = text.lower().split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def text_of(completion):
    """A completion's text. If the prompts are messages, a completion is a list of one message."""
    return completion if isinstance(completion, str) else completion[0]["content"]
