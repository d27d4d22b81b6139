"""Which of COCO's 80 classes a text names: our own table of words, or a published one.

A word counts as the class wherever it stands: "orange" is the fruit also when it is a colour.
What a word means inside another noun is told by `_COMPOUNDS`: a "baby elephant" is no person, a
"train station" no train.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from .noun_vocabulary import NounVocabulary

#: Class -> further words for it, in the singular. Words that mean too much are left out:
#: "computer" (a laptop?), "plant" (potted?), "glass" (of wine? of what a window is made?).
SYNONYMS = {
    "person": """man, woman, boy, girl, child, kid, baby, infant, toddler, adult, teenager, teen,
        human, guy, lady, gentleman, male, female, individual, pedestrian, passenger, commuter,
        driver, rider, cyclist, bicyclist, biker, motorcyclist, skier, snowboarder, skateboarder,
        skater, surfer, swimmer, runner, jogger, hiker, golfer, player, batter, pitcher, catcher,
        umpire, referee, athlete, jockey, cowboy, cowgirl, policeman, policewoman, police officer,
        officer, cop, fireman, firefighter, soldier, sailor, pilot, worker, chef, baker, waiter,
        waitress, bartender, vendor, farmer, fisherman, businessman, businesswoman, salesperson,
        doctor, nurse, dentist, patient, student, teacher, photographer, musician, dancer, clown,
        bride, groom, mother, mom, father, dad, parent, son, daughter, brother, sister, husband,
        wife, grandmother, grandma, grandfather, grandpa, friend, customer, shopper, tourist,
        traveler, traveller, spectator, bystander, onlooker, beachgoer""",
    "bicycle": "bike, tricycle, unicycle, road bike, mountain bike",
    "car": """automobile, sedan, hatchback, taxi, cab, taxicab, minivan, van, suv, jeep, limousine,
        limo, police car, race car, sports car""",
    "motorcycle": "motorbike, motor bike, motor cycle, scooter, motor scooter, moped, dirt bike",
    "airplane": """plane, aeroplane, air plane, aircraft, jet, jetliner, airliner, biplane,
        seaplane, fighter jet, jumbo jet""",
    "bus": "minibus, school bus, tour bus, double decker, doubledecker",
    "train": "locomotive, tram, streetcar, street car, subway train, train car, train engine",
    "truck": """lorry, pickup, pickup truck, pick up truck, firetruck, fire truck, fire engine,
        tow truck, dump truck, semi truck""",
    "boat": """ship, sailboat, sail boat, motorboat, speedboat, rowboat, row boat, canoe, kayak,
        yacht, ferry, ferryboat, tugboat, barge, dinghy, catamaran, gondola, houseboat, lifeboat,
        vessel""",
    "traffic light": "traffic signal, traffic lamp, stoplight, stop light",
    "fire hydrant": "hydrant, fireplug",
    "stop sign": "stopsign",
    "parking meter": "parkmeter, parking metre",
    "bench": "pew, park bench",
    "bird": """seagull, gull, pigeon, dove, duck, duckling, goose, gosling, swan, parrot, parakeet,
        cockatoo, macaw, owl, eagle, hawk, falcon, vulture, crow, raven, sparrow, robin, finch,
        hummingbird, woodpecker, rooster, hen, peacock, penguin, flamingo, heron, egret, pelican,
        stork, ostrich""",
    "cat": "kitten, kitty, tabby, tomcat, feline",
    "dog": """puppy, pup, doggy, doggie, hound, canine, mutt, terrier, poodle, bulldog, retriever,
        labrador, beagle, dachshund, chihuahua, corgi, collie, pug, spaniel, dalmatian, greyhound,
        rottweiler, schnauzer, german shepherd""",
    "horse": "pony, foal, colt, mare, stallion, racehorse",
    "sheep": "lamb, ewe, goat",  # COCO has no goats: its annotators made sheep of them
    "cow": "cattle, calf, bull, ox, heifer, steer, bison",
    "elephant": "",
    "bear": "grizzly, panda",
    "zebra": "",
    "giraffe": "",
    "backpack": "back pack, rucksack, knapsack, bookbag, book bag",
    "umbrella": "parasol",
    "handbag": "hand bag, purse, pocketbook",
    "tie": "necktie, neck tie, bow tie, bowtie",
    "suitcase": "suit case, luggage, baggage",
    "frisbee": "flying disc, flying disk",
    "skis": "ski",
    "snowboard": "snow board",
    "sports ball": "ball, basketball, volleyball",
    "kite": "",
    "baseball bat": "bat",
    "baseball glove": "baseball mitt, mitt, catcher mitt",
    "skateboard": "skate board",
    "surfboard": "surf board, boogie board, bodyboard, paddleboard",
    "tennis racket": "racket, racquet, tennis racquet",
    "bottle": "",
    "wine glass": "wineglass, champagne glass, champagne flute, goblet",
    "cup": "mug, teacup, tea cup, coffee cup",
    "fork": "",
    "knife": "",
    "spoon": "teaspoon, tablespoon",
    "bowl": "",
    "banana": "",
    "apple": "",
    "sandwich": "burger, hamburger, cheeseburger, panini, hoagie",
    "orange": "tangerine, clementine, mandarin",
    "broccoli": "",
    "carrot": "",
    "hot dog": "hotdog, frankfurter",
    "pizza": "",
    "donut": "doughnut, do nut",
    "cake": "cupcake, cheesecake, birthday cake",
    "chair": "seat, stool, armchair, arm chair, recliner",
    "couch": "sofa, loveseat, love seat, settee, futon",
    "potted plant": "houseplant, house plant, potted flower, potted tree",
    "bed": "mattress, bunkbed, bunk bed",
    "dining table": "table, desk",
    "toilet": "commode",
    "tv": "television, tv set, television set, monitor",
    "laptop": "laptop computer, notebook computer, netbook, macbook",
    "mouse": "computer mouse",
    "remote": "remote control, remote controller, controller, wiimote, wii remote",
    "keyboard": "computer keyboard",
    "cell phone": """cellphone, phone, telephone, mobile phone, smartphone, smart phone, iphone,
        flip phone""",
    "microwave": "microwave oven",
    "oven": "stove, toaster oven",
    "toaster": "",
    "sink": "washbasin, wash basin, washbowl",
    "refrigerator": "fridge, icebox",
    "book": "textbook, paperback, cookbook, novel",
    "clock": "timepiece, alarm clock",
    "vase": "",
    "scissors": "scissor, shears",
    "teddy bear": "teddy, teddybear, stuffed bear, toy bear, stuffed animal",
    "hair drier": "hairdrier, hair dryer, hairdryer, blow dryer, blow drier",
    "toothbrush": "tooth brush",
}
#: What holds a word of a class and is something else: the class that it is, or none.
_COMPOUNDS = {
    "toilet": "toilet seat, toilet bowl",
    "tie": "bow tie",
    "carrot": "baby carrot",
    "dog": "sheep dog",
    "cake": "carrot cake, cup cake",
    "truck": "truck bed",
    "": """train track, train station, train yard, bus stop, bus station, bus terminal, bike lane,
        bike path, bike helmet, bicycle helmet, bike rack, car park, car seat, cable car, jet ski,
        jet engine, dog house, bird house, bird cage, bird bath, bird feeder, cat food, dog food,
        rocking horse, horse shoe, book shelf, book case, flower bed, river bed, bed room,
        table cloth, table top, tie dye, cup holder, bottle opener, orange juice, apple pie,
        apple juice, apple tree, pizza box, pizza oven, mouse pad, oven mitt, sink hole, ski pole,
        ski slope, ski lift, ski resort, ski lodge, ski jump, ski boot, ski mask, ball park,
        ball game, ball field, toilet paper, record player, cd player, dvd player, water pitcher,
        baby stroller, baby carriage, baby bottle, rubber duck""",
}
#: Words that belong to an animal when they stand before it, and name a person alone.
_YOUNG = ("baby", "adult", "male", "female", "mother", "father")
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
_OTHER_ANIMALS = ("animal", "cub", "deer", "lion", "tiger", "monkey", "rabbit", "pig", "chick")
_VEHICLES = ("train", "airplane", "bus", "car", "boat", "truck")

#: A seat counts as a chair unless the text speaks of a toilet.
_SEAT = " seat"


class CocoNouns:
    """Finds the classes that a text names."""

    def __init__(self, spellings: Mapping[str, str], *, hyphens: bool = False) -> None:
        """spellings: each to its class, "" for what is of no class. hyphens: see
        `NounVocabulary`."""
        self._seat = spellings.get("seat", "")
        self._vocabulary = NounVocabulary((), {**spellings, "seat": _SEAT}, hyphens=hyphens)

    def mentions(self, text: str) -> list[str]:
        """The classes in the order in which they are named, a repeated one each time."""
        return [noun for noun, _, _ in self.find(text)]

    def find(self, text: str) -> list[tuple[str, int, int]]:
        """(class, start, end) of the same."""
        found = list(self._vocabulary.find(text))
        seat = "" if any(noun == "toilet" for noun, _, _ in found) else self._seat
        named = ((seat if noun == _SEAT else noun, start, end) for noun, start, end in found)
        return [mention for mention in named if mention[0]]


def ours() -> CocoNouns:
    """The table of this module."""
    return CocoNouns(_own())


def of_classes(names: Iterable[str]) -> CocoNouns:
    """For a data set with classes of its own: their names, and for those that COCO has, the words
    of this module. Words of other COCO classes keep theirs: "hot dog" names no dog. Hyphens are
    spaces; in the tables that CHAIR counts with they are not, as its authors' program has it."""
    names = list(names)
    own = {" ".join(name.lower().replace("_", " ").split()): name for name in names}
    spellings = {word: own.get(noun, "") for word, noun in _own().items()} | own
    return CocoNouns(spellings, hyphens=True)


def _own() -> dict[str, str]:
    spellings = dict(_spellings((noun, _split(words)) for noun, words in SYNONYMS.items()))
    spellings |= {
        f"{young} {word}": noun
        for young in _YOUNG
        for word, noun in (*spellings.items(), *((word, "") for word in _OTHER_ANIMALS))
        if noun in _ANIMALS or not noun
    }
    spellings |= {f"passenger {w}": noun for w, noun in spellings.items() if noun in _VEHICLES}
    compounds = {word: noun for noun, words in _COMPOUNDS.items() for word in _split(words)}
    return spellings | compounds


def published(lines: Sequence[str]) -> CocoNouns:
    """A table as Rohrbach et al. publish it (synonyms.txt): a line for each class, its name and
    other words between commas. Their rules for double words are added: baby and adult animals,
    passenger trains and jets, toilet seats, train tracks, bow ties."""
    spellings = dict(_spellings((words[0], words) for words in map(_split, lines) if words))
    animals = {word: spellings.get(word, "") for word in (*_ANIMALS, "animal", "cub")}
    rules = {f"{young} {word}": animals[word] for young in ("baby", "adult") for word in animals}
    rules |= {f"passenger {word}": spellings.get(word, "") for word in ("jet", "train")}
    rules |= {"bow tie": spellings.get("tie", ""), "toilet seat": spellings.get("toilet", "")}
    return CocoNouns(spellings | rules | {"train track": "", "home plate": ""})


def _spellings(table: Iterable[tuple[str, Sequence[str]]]) -> Iterator[tuple[str, str]]:
    for noun, words in table:
        yield noun, noun
        yield from ((word, noun) for word in words)


def _split(words: str) -> list[str]:
    return [clean for word in words.split(",") if (clean := " ".join(word.split()))]
