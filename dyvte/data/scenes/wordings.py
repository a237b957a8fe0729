"""How natural questions are worded: several wordings per type, some kept for held-out use only.

Every type has wordings that ask for a word or phrase, wordings that ask for a sentence, and wordings that
no training may use ("unseen"). The wording alone decides which form of the answer is right.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wordings:
    """Wordings of one question type; braces name the question's slots.

    Parameters
    ----------
    phrase : tuple of str
        Ask for a word or phrase, beside the wording that `questions.ask` gives.
    sentence : tuple of (str, str)
        Ask for a sentence, with the sentence that answers; ``{answer}`` is the phrase.
    unseen : tuple of str
        Ask for a word or phrase; never used in training.
    """

    phrase: tuple[str, ...]
    unseen: tuple[str, ...]
    sentence: tuple[tuple[str, str], ...] = ()


QUERIES: dict[str, Wordings] = {
    "background": Wordings(
        phrase=("Which color fills the background?", "Name the background color."),
        sentence=(("Tell me about the background.", "The background is {answer}."),),
        unseen=("What is the color of the background?", "What background color does this picture have?"),
    ),
    "existence": Wordings(
        phrase=("Can you see a {color} {name}?", "Does the image show a {color} {name}?"),
        unseen=("Is a {color} {name} visible?", "Does this picture contain a {color} {name}?"),
    ),
    "color": Wordings(
        phrase=("Which color does the {name} have?", "Name the color of the {name}."),
        sentence=(("Tell me the color of the {name}.", "The {name} is {answer}."),),
        unseen=("What is the color of the {name}?", "The {name} in the picture has which color?"),
    ),
    "shape": Wordings(
        phrase=("Which shape is {color}?", "Name the {color} shape."),
        sentence=(("Tell me which shape is {color}.", "The {color} shape is a {answer}."),),
        unseen=("What is the {color} shape called?", "What kind of shape is the {color} one?"),
    ),
    "cell": Wordings(
        phrase=("What can you see in {place}?", "Name what is in {place}."),
        sentence=(("Tell me what {place} holds.", "There is {answer} in {place}."),),
        unseen=("Which object is in {place}?", "What does {place} contain?"),
    ),
    "count": Wordings(
        phrase=("Count the {noun}.", "What is the number of {noun}?"),
        sentence=(("Tell me how many {noun} you see.", "I see {answer} {noun}."),),
        unseen=("How many {noun} can you see?", "How many {noun} does the picture show?"),
    ),
    "where": Wordings(
        phrase=("In which row and column is the {name}?", "Give the position of the {name}."),
        sentence=(("Tell me where the {name} is.", "The {name} is in {answer}."),),
        unseen=("Where can I find the {name}?", "What is the location of the {name}?"),
    ),
    "relation": Wordings(
        phrase=(
            "Is the {first} somewhere {word} the {second}?",
            "Can the {first} be found {word} the {second}?",
        ),
        unseen=(
            "Does the {first} lie {word} the {second}?",
            "Would you say the {first} is {word} the {second}?",
        ),
    ),
    "compare": Wordings(
        phrase=("Do you see more {first} than {second}?", "Does the image have more {first} than {second}?"),
        unseen=("Do {first} outnumber {second}?", "Is the number of {first} larger than that of {second}?"),
    ),
    "read": Wordings(
        phrase=("Which digit is written in {color}?", "Read the {color} digit."),
        sentence=(("Tell me the value of the {color} digit.", "The {color} digit is {answer}."),),
        unseen=("What number is drawn in {color}?", "What does the {color} digit say?"),
    ),
    "sum": Wordings(
        phrase=("Add the two digits.", "What do the two digits add up to?"),
        sentence=(("Tell me the sum of the digits.", "The digits add up to {answer}."),),
        unseen=("What is the total of both digits?", "How much is the sum of the two digits?"),
    ),
    "trail": Wordings(
        phrase=(
            "Follow the arrows from the orange one: what is at the end?",
            "What does the orange arrow lead to?",
        ),
        unseen=("If you follow the arrows starting at the orange one, what do you reach?",),
    ),
    "arrow": Wordings(
        phrase=("Answer what the orange arrow asks.",),
        unseen=("What is the answer to the orange arrow?",),
    ),
    "row": Wordings(
        phrase=("List row {row} from left to right.", "What do the four cells of row {row} hold?"),
        unseen=(
            "Go through row {row} from the left: what is there?",
            "Name the content of each cell in row {row}.",
        ),
    ),
    "column": Wordings(
        phrase=(
            "List column {column} from top to bottom.",
            "What do the four cells of column {column} hold?",
        ),
        unseen=(
            "Go through column {column} from the top: what is there?",
            "Name the content of each cell in column {column}.",
        ),
    ),
    "beside": Wordings(
        phrase=("Which object is directly {word} the {name}?", "Name what is directly {word} the {name}."),
        sentence=(
            ("Tell me what is directly {word} the {name}.", "Directly {word} the {name} there is {answer}."),
        ),
        unseen=("What is the direct neighbor {word} the {name}?", "What sits directly {word} the {name}?"),
    ),
    "larger": Wordings(
        phrase=(
            "Which digit has the larger value, {first} or {second}?",
            "Name the color of the larger digit.",
        ),
        sentence=(("Tell me which digit is larger.", "The {answer} digit is larger."),),
        unseen=("Is the {first} or the {second} digit the bigger one?", "What color is the bigger digit?"),
    ),
    "describe": Wordings(
        phrase=("Describe the whole image in detail.", "Give a full description of the scene."),
        unseen=(
            "What does this image show? Describe everything.",
            "Explain in detail what is in the picture.",
        ),
    ),
    "box": Wordings(
        phrase=(
            "Give the bounding box of the {name}.",
            "Please provide the bounding box coordinate of the region this sentence describes: the {name}",
        ),
        unseen=("What are the box coordinates of the {name}?", "Locate the {name} by a box."),
    ),
}

VERIFICATIONS: dict[str, Wordings] = {
    "background": Wordings(
        phrase=("Does the image have a {asked} background?", "Is it true that the background is {asked}?"),
        unseen=("Would you say the background is {asked}?",),
    ),
    "color": Wordings(
        phrase=("Does the {name} look {asked}?", "Is it true that the {name} is {asked}?"),
        unseen=("Would you say the {name} is {asked}?",),
    ),
    "count": Wordings(
        phrase=("Can you count {asked} {noun}?", "Is it true that there are {asked} {noun}?"),
        unseen=("Is the number of {noun} {asked}?",),
    ),
    "read": Wordings(
        phrase=("Does the {color} digit read {asked}?", "Is it true that the {color} digit is {asked}?"),
        unseen=("Would you say the {color} digit is {asked}?",),
    ),
    "sum": Wordings(
        phrase=("Do the two digits add up to {asked}?", "Is it true that the sum of the digits is {asked}?"),
        unseen=("Is {asked} the total of both digits?",),
    ),
}

# Around another question: the image decides whether that one has to be looked up at all.
SKIPS = Wordings(
    phrase=(
        "If the background is {asked}, say skipped. Otherwise: {inner}",
        "Say skipped if the background is {asked}. If it is not: {inner}",
    ),
    unseen=("In case of a {asked} background reply skipped, else answer this: {inner}",),
)

SHORT_SUFFIX = "\nAnswer the question using a single word or phrase."
YES_NO_SUFFIX = " Please answer yes or no."
