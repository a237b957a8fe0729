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
        Ask for a word or phrase; never used in training. Whoever adds wordings to train on has read these,
        and writes like them: add new ones here after a training, and look at those.
    """

    phrase: tuple[str, ...]
    unseen: tuple[str, ...]
    sentence: tuple[tuple[str, str], ...] = ()


QUERIES: dict[str, Wordings] = {
    "background": Wordings(
        phrase=(
            "Which color fills the background?",
            "Name the background color.",
            "Behind all the objects, which color do you see?",
            "Say which color the background has.",
            "The background: which color is it?",
        ),
        sentence=(("Tell me about the background.", "The background is {answer}."),),
        unseen=(
            "What is the color of the background?",
            "What background color does this picture have?",
            "What color lies behind the shapes?",
            "I wonder about the background color.",
        ),
    ),
    "existence": Wordings(
        phrase=(
            "Can you see a {color} {name}?",
            "Does the image show a {color} {name}?",
            "Is there any {color} {name} here?",
            "Do you find a {color} {name} in the image?",
            "Is a {color} {name} present?",
        ),
        unseen=(
            "Is a {color} {name} visible?",
            "Does this picture contain a {color} {name}?",
            "Is there such a thing as a {color} {name} in the photo?",
            "Any sign of a {color} {name}?",
        ),
    ),
    "color": Wordings(
        phrase=(
            "Which color does the {name} have?",
            "Name the color of the {name}.",
            "In which color is the {name} drawn?",
            "Say what color the {name} is.",
            "Look at the {name}. Which color is it?",
            "The {name} is of which color?",
        ),
        sentence=(("Tell me the color of the {name}.", "The {name} is {answer}."),),
        unseen=(
            "What is the color of the {name}?",
            "The {name} in the picture has which color?",
            "What hue is the {name}?",
            "Could you tell me the {name}'s color?",
        ),
    ),
    "shape": Wordings(
        phrase=(
            "Which shape is {color}?",
            "Name the {color} shape.",
            "Which shape has the color {color}?",
            "Of the shapes, which one is {color}?",
            "Say which shape is drawn in {color}.",
        ),
        sentence=(("Tell me which shape is {color}.", "The {color} shape is a {answer}."),),
        unseen=(
            "What is the {color} shape called?",
            "What kind of shape is the {color} one?",
            "Identify the shape with {color} paint.",
            "I see something {color}; which shape is it?",
        ),
    ),
    "cell": Wordings(
        phrase=(
            "What can you see in {place}?",
            "Name what is in {place}.",
            "Look at {place}. What do you find?",
            "What has been placed in {place}?",
            "In {place}, what is shown?",
            "Say what you see in {place}.",
            "Which thing is drawn in {place}?",
        ),
        sentence=(("Tell me what {place} holds.", "There is {answer} in {place}."),),
        unseen=(
            "Which object is in {place}?",
            "What does {place} contain?",
            "What occupies {place}?",
            "Tell me the content at {place}.",
        ),
    ),
    "count": Wordings(
        phrase=(
            "Count the {noun}.",
            "What is the number of {noun}?",
            "How often do {noun} appear?",
            "Say how many {noun} there are in the image.",
            "How large is the number of {noun}?",
        ),
        sentence=(("Tell me how many {noun} you see.", "I see {answer} {noun}."),),
        unseen=("How many {noun} can you see?", "How many {noun} does the picture show?"),
    ),
    "where": Wordings(
        phrase=(
            "In which row and column is the {name}?",
            "Give the position of the {name}.",
            "Which cell holds the {name}?",
            "Find the {name} and name its row and column.",
        ),
        sentence=(("Tell me where the {name} is.", "The {name} is in {answer}."),),
        unseen=(
            "Where can I find the {name}?",
            "What is the location of the {name}?",
            "Where does the {name} sit?",
            "At which spot of the grid is the {name}?",
        ),
    ),
    "relation": Wordings(
        phrase=(
            "Is the {first} somewhere {word} the {second}?",
            "Seen from the {second}, is the {first} {word} it?",
            "Is it true that the {first} is {word} the {second}?",
            "Can the {first} be found {word} the {second}?",
        ),
        unseen=(
            "Does the {first} lie {word} the {second}?",
            "Would you say the {first} is {word} the {second}?",
        ),
    ),
    "compare": Wordings(
        phrase=(
            "Do you see more {first} than {second}?",
            "Does the image have more {first} than {second}?",
            "Are the {first} more numerous than the {second}?",
            "Is it true that there are more {first} than {second}?",
            "Count both: are {first} more frequent than {second}?",
            "Is the count of {first} above the count of {second}?",
        ),
        unseen=(
            "Do {first} outnumber {second}?",
            "Is the number of {first} larger than that of {second}?",
            "Comparing counts, do {first} beat {second}?",
            "Are there fewer {second} than {first}?",
        ),
    ),
    "read": Wordings(
        phrase=(
            "Which digit is written in {color}?",
            "Read the {color} digit.",
            "Which value does the {color} digit have?",
            "Name the digit in {color}.",
        ),
        sentence=(("Tell me the value of the {color} digit.", "The {color} digit is {answer}."),),
        unseen=(
            "What number is drawn in {color}?",
            "What does the {color} digit say?",
            "The number painted {color} is which one?",
            "Which numeral appears in {color}?",
        ),
    ),
    "sum": Wordings(
        phrase=(
            "Add the two digits.",
            "What do the two digits add up to?",
            "Both digits together make which number?",
            "Compute the first digit plus the second one.",
        ),
        sentence=(("Tell me the sum of the digits.", "The digits add up to {answer}."),),
        unseen=("What is the total of both digits?", "How much is the sum of the two digits?"),
    ),
    "trail": Wordings(
        phrase=(
            "Follow the arrows from the orange one: what is at the end?",
            "What does the orange arrow lead to?",
            "Start at the orange arrow and go on until the arrows end. What is there?",
            "Which object does the path of arrows end at?",
            "Go where the arrows point, the orange one first. What do you find?",
        ),
        unseen=(
            "If you follow the arrows starting at the orange one, what do you reach?",
            "Where do the arrows take you when you begin with the orange one?",
            "What is the final stop of the arrow path?",
        ),
    ),
    "arrow": Wordings(
        phrase=("Answer what the orange arrow asks.", "The orange arrow asks something. Answer it."),
        unseen=("What is the answer to the orange arrow?",),
    ),
    "row": Wordings(
        phrase=(
            "List row {row} from left to right.",
            "What do the four cells of row {row} hold?",
            "Say what is in row {row}, cell by cell.",
            "Read row {row}, starting at the left.",
            "Which four things make up row {row}?",
        ),
        unseen=(
            "Go through row {row} from the left: what is there?",
            "Name the content of each cell in row {row}.",
            "Enumerate the contents of row {row}.",
            "Walk along row {row} and report what you meet.",
        ),
    ),
    "column": Wordings(
        phrase=(
            "List column {column} from top to bottom.",
            "What do the four cells of column {column} hold?",
            "Say what is in column {column}, cell by cell.",
            "Read column {column}, starting at the top.",
            "Which four things make up column {column}?",
        ),
        unseen=(
            "Go through column {column} from the top: what is there?",
            "Name the content of each cell in column {column}.",
            "Enumerate the contents of column {column}.",
            "Walk down column {column} and report what you meet.",
        ),
    ),
    "beside": Wordings(
        phrase=(
            "Which object is directly {word} the {name}?",
            "Name what is directly {word} the {name}.",
            "Find the {name}. What is in the cell directly {word} it?",
            "What do you see immediately {word} the {name}?",
            "Which object is next to the {name}, directly {word} it?",
            "Look one cell {word} the {name}. What is there?",
        ),
        sentence=(
            ("Tell me what is directly {word} the {name}.", "Directly {word} the {name} there is {answer}."),
        ),
        unseen=(
            "What is the direct neighbor {word} the {name}?",
            "What sits directly {word} the {name}?",
            "Which thing borders the {name} {word} it?",
            "What is adjacent to the {name}, directly {word} it?",
        ),
    ),
    "larger": Wordings(
        phrase=(
            "Which digit has the larger value, {first} or {second}?",
            "Name the color of the larger digit.",
            "Compare the {first} and the {second} digit: which has the higher value?",
            "Of the {first} and the {second} digit, which is worth more?",
            "Which color does the digit with the greater value have?",
            "Say which color the digit with the higher value has.",
            "Is the larger digit the {first} or the {second} one?",
        ),
        sentence=(("Tell me which digit is larger.", "The {answer} digit is larger."),),
        unseen=(
            "Is the {first} or the {second} digit the bigger one?",
            "What color is the bigger digit?",
            "Between the {first} and {second} digit, which wins in value?",
            "Which digit counts for more, {first} or {second}?",
        ),
    ),
    "describe": Wordings(
        phrase=(
            "Describe the whole image in detail.",
            "Give a full description of the scene.",
            "Describe row by row what you see.",
            "Write down everything that the picture contains.",
        ),
        unseen=(
            "What does this image show? Describe everything.",
            "Explain in detail what is in the picture.",
        ),
    ),
    "box": Wordings(
        phrase=(
            "Give the bounding box of the {name}.",
            "Please provide the bounding box coordinate of the region this sentence describes: the {name}",
            "Draw a box around the {name} and give its corners.",
            "Which box encloses the {name}?",
        ),
        unseen=("What are the box coordinates of the {name}?", "Locate the {name} by a box."),
    ),
}

VERIFICATIONS: dict[str, Wordings] = {
    "background": Wordings(
        phrase=(
            "Does the image have a {asked} background?",
            "Is it true that the background is {asked}?",
            "Is {asked} the color behind all the objects?",
            "Can it be said that the background is {asked}?",
        ),
        unseen=(
            "Would you say the background is {asked}?",
            "Would {asked} be the background color?",
        ),
    ),
    "color": Wordings(
        phrase=(
            "Does the {name} look {asked}?",
            "Is it true that the {name} is {asked}?",
            "Is {asked} the color of the {name}?",
            "Can it be said that the {name} is {asked}?",
        ),
        unseen=(
            "Would you say the {name} is {asked}?",
            "Would {asked} be the {name}'s color?",
        ),
    ),
    "count": Wordings(
        phrase=(
            "Can you count {asked} {noun}?",
            "Is it true that there are {asked} {noun}?",
            "Do you see exactly {asked} {noun}?",
        ),
        unseen=("Is the number of {noun} {asked}?",),
    ),
    "read": Wordings(
        phrase=(
            "Does the {color} digit read {asked}?",
            "Is it true that the {color} digit is {asked}?",
            "Is {asked} the value of the {color} digit?",
            "Can it be said that the {color} digit is {asked}?",
        ),
        unseen=(
            "Would you say the {color} digit is {asked}?",
            "Would the {color} digit be a {asked}?",
        ),
    ),
    "sum": Wordings(
        phrase=(
            "Do the two digits add up to {asked}?",
            "Is it true that the sum of the digits is {asked}?",
            "Do both digits together make {asked}?",
        ),
        unseen=("Is {asked} the total of both digits?",),
    ),
}

# Around another question: the image decides whether that one has to be looked up at all.
SKIPS = Wordings(
    phrase=(
        "If the background is {asked}, say skipped. Otherwise: {inner}",
        "Say skipped if the background is {asked}. If it is not: {inner}",
        "Is the background {asked}? Then say skipped. If not, answer: {inner}",
        "When the background is {asked}, your answer is skipped; when it is not, answer this: {inner}",
        "Given a {asked} background, say skipped. With any other background: {inner}",
        "Reply skipped when you see a {asked} background, and otherwise tell me: {inner}",
        "Answer the question unless the background is {asked}, then say skipped: {inner}",
    ),
    unseen=(
        "In case of a {asked} background reply skipped, else answer this: {inner}",
        "Should the background turn out {asked}, write skipped; in all other cases: {inner}",
        "{inner} But write skipped in case the background is {asked}.",
    ),
)

SHORT_SUFFIX = "\nAnswer the question using a single word or phrase."
YES_NO_SUFFIX = " Please answer yes or no."
