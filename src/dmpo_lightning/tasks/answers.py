"""Finding the answer in a completion. Text is parsed, never evaluated."""


def tag_text(completion: str) -> str:
    """What follows the last ``<answer>`` (the whole text if there is none), up to the first ``</answer>`` in it,
    stripped.
    """
    return completion.rpartition("<answer>")[2].partition("</answer>")[0].strip()
