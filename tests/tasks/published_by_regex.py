"""The published checks in plain `re`, as slow as they come: what the fast ones must agree with."""

import re

ENDS = r"<\|eot_id\|>|<\|endoftext\|>"
SUDOKU = [
    r"<answer>.*?```\s*([\d\s]+)```",
    rf"<answer>(.*?)(?:{ENDS}|</answer>)",
    rf"</answer>\s*(.*?)(?:{ENDS}|$)",
    r".*?(\d{16})\s*</answer>",
    r"\b(\d{16})\b",
]


def gsm8k_answer(text):
    """The first box that is or holds a number, else the first answer tag, if it is one, or its last number."""
    for found in re.findall(r"\\boxed{(.*?)}", text):
        box = found.strip()
        if box and not re.fullmatch(r"\.+", box):
            number = is_or_holds(box, 0)
            if number is not None:
                return number
    tag = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
    return is_or_holds(tag[1].strip(), -1) if tag else None


def is_or_holds(text, which):
    try:
        return float(text)
    except ValueError:
        numbers = re.findall(r"-?\d+\.?\d*", text)
        return float(numbers[which]) if numbers else None


def gsm8k_format(text):
    """Soft and strict."""
    soft = re.match(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", text)
    strict = re.match(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$", text)
    return bool(soft), bool(strict)


def gsm8k_tags(text):
    """0.125 for each tag that stands once, less 0.001 per character after the closing ones."""
    total = 0.125 * sum(text.count(tag) == 1 for tag in ("<reasoning>\n", "\n</reasoning>\n"))
    if text.count("\n<answer>\n") == 1:
        total += 0.125 - 0.001 * len(text.split("\n</answer>\n")[-1])
    if text.count("\n</answer>") == 1:
        total += 0.125 - 0.001 * (len(text.split("\n</answer>")[-1]) - 1)
    return total


def last_boxed(text):
    """From the last box to the brace that closes the first one opened, character by character."""
    if "\\boxed " in text:
        return "\\boxed " + text.split("\\boxed ")[-1].split("$")[0]
    start = text.rfind("\\boxed")
    start = text.rfind("\\fbox") if start < 0 else start
    if start < 0:
        return text
    opened = 0
    for place in range(start, len(text)):
        opened += {"{": 1, "}": -1}.get(text[place], 0)
        if text[place] == "}" and opened == 0:
            return text[start : place + 1]
    return None


def last_answer(text):
    tags = re.findall("<answer>(.*?)</answer>", text, re.DOTALL)
    return tags[-1] if tags else None


def equation(text):
    """The left side of the first equation, else the text."""
    for command, symbol in (("\\div", "/"), ("\\times", "*"), ("\\cdot", "*")):
        text = text.replace(command, symbol)
    found = re.search(r"([0-9+\-*/() ]+)=[0-9. ]+", text)
    return found[1].strip() if found else text


def math_format(text):
    """Half of: 1 for a tag, 1 for a box in it or 0.5 for none; of the whole text if there is no tag."""
    pieces = text.split("<answer>")
    looked_at = pieces[1].split("</answer>")[0] if len(pieces) > 1 else text
    return 0.5 * ((len(pieces) > 1) + (1.0 if "\\boxed" in looked_at else 0.5))


def sudoku_cells(text, puzzle, solution):
    """The training reward: the blanks that the digits of the last closed tag fill rightly."""
    digits = "".join(character for character in last_answer(text) or "" if character.isdigit())
    blanks = [cell for cell in range(16) if puzzle[cell] == "0"]
    return sum(digits[cell : cell + 1] == solution[cell] for cell in blanks) / len(blanks)


def sudoku_answer(text):
    """The first pattern whose group is not blank, without white space, cut or padded."""
    for pattern in SUDOKU:
        found = re.search(pattern, text, re.DOTALL)
        if found and found[1].strip():
            return re.sub(r"\s+", "", found[1])[:16].ljust(16, "0")
    return ""


def normal(text):
    """MATH: the published steps in their order; ValueError or IndexError where they fail."""
    for dropped in ("\n", "\\!"):
        text = text.replace(dropped, "")
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for dropped in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(dropped, "")
    if "\\text{ " in text:
        text, _ = text.split("\\text{ ")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text == "":
        return text
    if text[0] == ".":
        text = "0" + text
    if text.count("=") == 1 and len(text.split("=")[0]) <= 2:
        text = text.split("=")[1]
    if "\\sqrt" in text:
        head, *rest = text.split("\\sqrt")
        text = head + "".join("\\sqrt" + (part if part[0] == "{" else "{" + part[0] + "}" + part[1:]) for part in rest)
    return slash(fractions(text.replace(" ", "")))


def fractions(text):
    head, *rest = text.split("\\frac")
    for part in rest:
        head += "\\frac"
        if part[0] == "{":
            head += part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            head += "{" + part[0] + "}" + part[1:]
        else:
            head += "{" + part[0] + "}{" + part[1] + "}" + part[2:]
    return head


def slash(text):
    if text == "0.5":
        return "\\frac{1}{2}"
    if text.count("/") != 1:
        return text
    above, below = (int(side) for side in text.split("/"))
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


def equivalent(first, second):
    if first is None or second is None:
        return first is None and second is None
    try:
        return normal(first) == normal(second)
    except (ValueError, IndexError):
        return first == second
