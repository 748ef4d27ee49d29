"""What the second edition draws and what it is called, in two languages: icons, shapes, tinted objects.

``things.csv`` holds 952 icons with their names, Chinese measure words and irregular English plurals; shapes
and tints are listed here. :func:`describe` and its siblings turn a scene into the sentences that ask for it.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent

COLORS = {
    "red": ("红色", "红"),
    "orange": ("橙色", "橙"),
    "yellow": ("黄色", "黄"),
    "green": ("绿色", "绿"),
    "blue": ("蓝色", "蓝"),
    "purple": ("紫色", "紫"),
    "pink": ("粉色", "粉"),
    "brown": ("棕色", "棕"),
    "black": ("黑色", "黑"),
}
NUMBERS = {1: ("one", "一"), 2: ("two", "两"), 3: ("three", "三")}
SIDES = {
    "left": (("on the left",), ("左边", "左侧")),
    "right": (("on the right",), ("右边", "右侧")),
    "top": (("at the top", "on top"), ("上面", "上方", "上边")),
    "bottom": (("at the bottom",), ("下面", "下方", "下边")),
}
SIZES = {"small": (("small", "little", "tiny"), "小"), "big": (("big", "large"), "大")}

# English names, Chinese names, measure word
SHAPES = {
    "heart": (("heart",), ("心", "爱心", "心形"), "颗"),
    "star": (("star",), ("星星",), "颗"),
    "circle": (("circle",), ("圆形", "圆", "圆圈"), "个"),
    "square": (("square",), ("正方形", "方块"), "个"),
    "triangle": (("triangle",), ("三角形",), "个"),
    "diamond": (("diamond",), ("菱形",), "个"),
    "moon": (("moon", "crescent"), ("月牙", "月亮"), "个"),
}
RAINBOW = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
# Code point -> names that go with a color, and whether brown and black are drawn too; the color that the icon
# has by itself comes first.
TINTED = {
    "1f697": ("red", "car|automobile", "汽车|小汽车|车", True),
    "1f388": ("red", "balloon", "气球", False),
    "1f34e": ("red", "apple", "苹果", False),
    "1f98b": ("", "butterfly", "蝴蝶", True),
    "1f337": ("", "flower|tulip", "花|郁金香", False),
    "1f339": ("red", "rose", "玫瑰|玫瑰花", True),
    "1f41f": ("", "fish", "鱼", True),
    "1f4d5": ("red", "book", "书", True),
    "1f455": ("", "shirt|t-shirt", "衬衫|T恤", True),
    "1f3e0": ("", "house", "房子|屋子", False),
    "2602": ("purple", "umbrella", "雨伞|伞", True),
    "1f457": ("", "dress", "裙子|连衣裙", True),
    "1f426": ("", "bird", "鸟", True),
    "1f431": ("", "cat", "猫", True),
    "1f436": ("", "dog", "狗", True),
    "1f40e": ("", "horse", "马", True),
    "1f409": ("green", "dragon", "龙", True),
    "1f43b": ("brown", "bear", "熊", True),
    "1f438": ("green", "frog", "青蛙", False),
    "1f40d": ("green", "snake", "蛇", True),
    "1f422": ("green", "turtle", "乌龟", False),
    "1f996": ("green", "dinosaur", "恐龙", False),
    "1f68c": ("", "bus", "公交车|巴士", True),
    "1f69a": ("", "truck", "卡车|货车", True),
    "1f6b2": ("", "bicycle|bike", "自行车", True),
    "1f680": ("", "rocket", "火箭", False),
    "26f5": ("", "sailboat|boat", "帆船|船", False),
    "1f9e2": ("blue", "cap|hat", "帽子", True),
    "1f381": ("", "gift|present", "礼物", False),
    "1f344": ("red", "mushroom", "蘑菇", True),
    "1f45c": ("", "bag|handbag", "包|手提包", True),
    "1f341": ("", "maple leaf|leaf", "枫叶|叶子", True),
    "1f333": ("green", "tree", "树", False),
    "270f": ("", "pencil", "铅笔", False),
    "1fa91": ("", "chair", "椅子", True),
    "1f6aa": ("brown", "door", "门", True),
    "1f6cb": ("", "sofa|couch", "沙发", True),
    "1f3b8": ("", "guitar", "吉他", True),
    "1f48e": ("blue", "gem|gemstone", "宝石", False),
    "1f511": ("", "key", "钥匙", False),
    "1f514": ("yellow", "bell", "铃铛", False),
    "1f451": ("yellow", "crown", "皇冠", False),
    "1f9f8": ("brown", "teddy bear", "泰迪熊|玩具熊", False),
    "1f916": ("", "robot", "机器人", False),
    "1f383": ("orange", "pumpkin", "南瓜", False),
}

# Never shown in training, in any scene: these show whether words combine.
HELD_OUT_COLORS = frozenset(
    {
        ("green", "heart"), ("blue", "star"), ("pink", "circle"), ("red", "square"), ("purple", "triangle"),
        ("yellow", "moon"), ("blue", "car"), ("green", "balloon"), ("purple", "apple"),
        ("orange", "butterfly"), ("purple", "house"), ("green", "dress"), ("blue", "rose"),
        ("yellow", "bird"), ("pink", "cat"),
        ("blue", "dragon"), ("red", "bus"), ("orange", "cap"), ("green", "bag"), ("yellow", "guitar"),
    }
)  # fmt: skip
HELD_OUT_COUNTS = frozenset(
    {
        (2, "dog"), (3, "apple"), (2, "car"), (3, "bird"), (2, "tree"), (3, "fish"), (2, "balloon"),
        (3, "banana"),
        (2, "rose"), (3, "key"), (2, "house"), (3, "egg"), (2, "star"), (3, "butterfly"),
    }
)  # fmt: skip
HELD_OUT_PAIRS = frozenset(
    frozenset(pair)
    for pair in (
        ("dog", "soccer ball"), ("cat", "fish"), ("rabbit", "carrot"), ("tree", "house"), ("rocket", "moon"),
        ("crown", "ring"), ("book", "pencil"), ("bee", "sunflower"), ("apple", "banana"), ("guitar", "drum"),
        ("lock", "key"), ("penguin", "snowman"), ("frog", "lotus"), ("hamburger", "pizza"),
        ("bus", "bicycle"),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One picture with its names.

    ``code`` and ``color`` say how it is drawn, ``name`` is its first English name, without color.

    ``plural`` is of the first English name, or empty for what cannot be counted.
    """

    id: str
    code: str
    color: str
    name: str
    english: tuple[str, ...]
    chinese: tuple[str, ...]
    measure: str
    plural: str
    shape: bool = False

    @property
    def held_out(self) -> bool:
        return (self.color, self.name) in HELD_OUT_COLORS

    def count_held_out(self, count: int) -> bool:
        return (count, self.name) in HELD_OUT_COUNTS


def plural_of(name: str) -> str:
    """The regular plural of a name's last word."""
    if re.search(r"(s|x|z|ch|sh)$", name):
        return name + "es"
    if re.search(r"[^aeiou]y$", name):
        return name[:-1] + "ies"
    return name + "s"


def read_things(path: Path = HERE / "things.csv") -> list[Thing]:
    """Icons, shapes in all colors, and tints, in this order."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    icons = []
    for row in rows:
        english, chinese = tuple(row["english"].split("|")), tuple(row["chinese"].split("|"))
        plural = "" if row["plural"] == "-" else row["plural"] or plural_of(english[0])
        icons.append(
            Thing(
                row["codepoint"], row["codepoint"], "", english[0], english, chinese, row["measure"], plural
            )
        )
    shapes = [
        Thing(f"{color}-{shape}", "", color, shape, english, chinese, measure, plural_of(english[0]), True)
        for shape, (english, chinese, measure) in SHAPES.items()
        for color in COLORS
    ]
    return icons + shapes + list(_tints({thing.code: thing for thing in icons}))


def _tints(icons: dict[str, Thing]) -> list[Thing]:
    found = []
    for code, (own, english, chinese, dark) in TINTED.items():
        icon = icons[code]
        names = tuple(english.split("|"))
        for color in (*RAINBOW, *(("brown", "black") if dark else ())):
            if color != own:
                plural = icon.plural if icon.name == names[0] else plural_of(names[0])
                found.append(
                    Thing(
                        f"{color}-{code}",
                        code,
                        color,
                        names[0],
                        names,
                        tuple(chinese.split("|")),
                        icon.measure,
                        plural,
                    )
                )
    return found


# -- noun phrases ------------------------------------------------------------------------


def article(words: str) -> str:
    return "an" if words[0].lower() in "aeiou" and not words.startswith(("uni", "one", "ufo", "eu")) else "a"


def with_article(thing: Thing, noun: str) -> str:
    """ "a red car", but "blue socks" and "rice"."""
    counted = thing.plural or " of " in noun
    return f"{article(noun)} {noun}" if counted else noun


def english_nouns(thing: Thing, size: str = "") -> list[str]:
    """ "red car", "small red car", without article."""
    color = f"{thing.color} " if thing.color else ""
    sizes = [f"{word} " for word in SIZES[size][0]] if size else [""]
    return [f"{big}{color}{name}" for name in thing.english for big in sizes]


def english_plurals(thing: Thing, count: int) -> list[str]:
    color = f"{thing.color} " if thing.color else ""
    return [f"{NUMBERS[count][0]} {color}{thing.plural}", f"{count} {color}{thing.plural}"]


def chinese_nouns(thing: Thing, size: str = "") -> list[str]:
    """红色的汽车, 红色汽车; 红色的小汽车, 小的红色汽车."""
    long, short = COLORS[thing.color] if thing.color else ("", "")
    big = SIZES[size][1] if size else ""
    found = []
    for name in thing.chinese:
        if long and big:
            found += [f"{long}的{big}{name}", f"{big}的{long}{name}", f"{big}{long}{name}"]
        elif long:
            found += [f"{long}的{name}", f"{long}{name}", f"{short}{name}"]
        elif big:
            found += [f"{big}{name}", f"{big}的{name}", f"很{big}的{name}"]
        else:
            found.append(name)
    return found


def chinese_counted(thing: Thing, count: int, size: str = "") -> list[str]:
    """一辆红色的汽车: every noun with its measure word, and with 个, which many people use for everything."""
    number = NUMBERS[count][1]
    measures = [thing.measure, thing.measure, "个"] if thing.measure != "个" else ["个"]
    nouns = chinese_nouns(thing, size)
    found = [f"{number}{measures[i % len(measures)]}{noun}" for i, noun in enumerate(nouns)]
    found += [f"{number}{thing.measure}{noun}" for noun in nouns[1:]]
    if count > 1:
        found.append(f"{count}{thing.measure}{nouns[0]}")
    return found


# -- sentences ---------------------------------------------------------------------------


def balanced(english: list[str], chinese: list[str]) -> list[str]:
    """As many captions in each language, alternating."""
    longest = max(len(english), len(chinese))
    return [group[i % len(group)] for i in range(longest) for group in (english, chinese)]


def describe(thing: Thing, size: str = "", side: str = "") -> list[str]:
    """One thing, somewhere."""
    english, chinese = [], []
    for noun in english_nouns(thing, size):
        one = with_article(thing, noun)
        if side:
            for place in SIDES[side][0]:
                english += [f"{noun} {place}", f"{one} {place}"]
        else:
            english += [noun, one, one, f"a picture of {one}", f"{noun} emoji"]
            english += [f"one {noun}"] if thing.plural else []
    counted = chinese_counted(thing, 1, size)
    nouns = chinese_nouns(thing, size)
    if side:
        places = SIDES[side][1]
        for i, noun in enumerate(nouns):
            place = places[i % len(places)]
            chinese += [f"{place}的{noun}", f"{noun}在{places[0]}"]
        chinese += [f"{places[i % len(places)]}有{one}" for i, one in enumerate(counted)]
        chinese += [f"{one}在{places[i % len(places)]}" for i, one in enumerate(counted)]
    else:
        chinese += nouns * 2 + counted * 2
        chinese += [f"一张{nouns[0]}的图片", f"{nouns[-1]}图标", f"画{counted[0]}"]
    return balanced(english, chinese)


def describe_count(thing: Thing, count: int) -> list[str]:
    return balanced(english_plurals(thing, count), chinese_counted(thing, count))


def describe_pair(first: Thing, second: Thing, stacked: bool, named: tuple[str, str, str, str]) -> list[str]:
    """Two things, the first on the left or on top; ``named``: a noun of each in English, then in Chinese."""
    a, b = (with_article(thing, noun) for thing, noun in zip((first, second), named[:2], strict=True))
    c, d = (f"一{thing.measure}{noun}" for thing, noun in zip((first, second), named[2:], strict=True))
    if stacked:
        english = [f"{a} above {b}", f"{a} on top of {b}", f"{b} below {a}"]
        chinese = [f"{c}在{d}上面", f"上面是{c}，下面是{d}", f"{d}在{c}下面"]
    else:
        english = [f"{a} and {b}", f"{a} and {b}", f"{named[0]} and {named[1]}", f"{a} next to {b}"]
        english += [f"{a} on the left and {b} on the right"]
        chinese = [
            f"{c}和{d}",
            f"{c}和{d}",
            f"{named[2]}和{named[3]}",
            f"{c}在{d}旁边",
            f"左边是{c}，右边是{d}",
        ]
    return balanced(english, chinese)


def pair_held_out(first: Thing, second: Thing) -> bool:
    return frozenset((first.name, second.name)) in HELD_OUT_PAIRS
