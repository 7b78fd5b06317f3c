# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "tensorflow>=2.21,<2.22",
#     "keras>=3.15.1,<4",
#     "numpy>=2.0",
#     "scipy>=1.14",
#     "pillow>=13.0",
#     "opencv-python>=4.10,<5",
#     "av>=18",
#     "matplotlib>=3.9",
#     "pillow-heif>=1.0",
#     "tqdm>=4.66",
#     "filelock>=3.12",
#     "defusedxml>=0.7",
# ]
# ///
"""Draws a training set of cartoon faces, and a film in which two of the people move about.

    python tests/sample_faces.py people
    python tests/sample_faces.py people --people 5 --pictures 40 --clip people.mp4

Every picture is people/<name>/<number>.jpg, framed as the tagger frames faces: a square about twice
as wide as the face box. What makes a person (hair, skin, glasses, beard…) stays; pose, expression,
light, clothes and room change. The same numbers give the same pictures. Beside the film,
people.json holds the true face boxes.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import utils

SIDE = 160  # pixels of a training picture
FRAME = (640, 480)  # pixels of the film
FPS = 25
SECONDS = 6
SEED = 1
CODECS = {".mp4": "mp4v", ".avi": "MJPG"}
SMOOTH = 3  # shapes are drawn this many times larger and then reduced, for soft edges
# Side in head units of the box in which a Haar detector sees the face: the median over all people.
BOX = 1.14

SKINS = {"fair": "#f8dcc6", "rosy": "#f0c09c", "olive": "#dcae7f"}
SKINS |= {"brown": "#a06a45", "dark": "#7d4f34"}
HAIRS = {"black": "#2b262e", "brown": "#5c3a26", "ginger": "#cf6a2c"}
HAIRS |= {"blond": "#e3ba62", "grey": "#9b9aa1"}
SHIRTS = "#2f6f8f #c8553d #588157 #e0a030 #6d597a #34495e #d88c9a #8d99ae #3f8f86 #f0e6d6".split()
WALLS = "#cfd8d3 #e8dcc8 #b9cbd9 #d9c2b4 #9fb3a8 #c9c3d6 #8496a9 #efe9df #a89f91".split()

# width: half the face's; jaw: 0.7 (square) to 1.05 (pointed); brow: half its thickness.
TRAITS = ("name", "skin", "hair", "style", "glasses", "beard", "width", "jaw", "brow")
PEOPLE = (
    ("Ann", "fair", "ginger", "long", "none", "none", 0.40, 0.95, 0.018),
    ("Ben", "dark", "black", "short", "none", "full", 0.42, 0.80, 0.026),
    ("Cleo", "olive", "black", "bob", "round", "none", 0.40, 0.95, 0.018),
    ("Dan", "rosy", "blond", "quiff", "none", "none", 0.42, 0.75, 0.024),
    ("Eva", "brown", "brown", "curls", "none", "none", 0.41, 0.95, 0.020),
    ("Mihály", "rosy", "grey", "bald", "square", "moustache", 0.42, 0.85, 0.026),
)
# Outlines, as "x,y x,y …" in hundredths of a head unit: (0, 0) is the middle of the face, y points
# down; the brows lie at -21, the eyes at -10, the mouth at 29, the chin at 51. Hair is partly
# behind, partly before the head.
HAIR_BACK = {
    "long": "-48,-30 -54,20 -58,75 0,85 58,75 54,20 48,-30 0,-70",
    "bob": "-50,-30 -55,10 -54,46 0,50 54,46 55,10 50,-30 0,-70",
    "short": "-44,-10 -45,-40 -30,-65 0,-72 30,-65 45,-40 44,-10 0,0",
    "quiff": "-44,-10 -45,-40 -30,-65 0,-72 30,-65 45,-40 44,-10 0,0",
    "bald": "-44,-10 -46,-20 -44,-30 0,-30 44,-30 46,-20 44,-10 0,0",
    "curls": "0,-78 -16,-85 -26,-75 -42,-73 -45,-60 -57,-53 -54,-39 -64,-28 -56,-16 -62,-2 -52,8 "
    "-52,22 -40,24 -30,34 30,34 40,24 52,22 52,8 62,-2 56,-16 64,-28 54,-39 57,-53 45,-60 42,-73 "
    "26,-75 16,-85",
}
HAIR_FRONT = {
    "bald": "35,-4 35,-22 31,-40 37,-50 46,-36 49,-18 46,-4 / "
    "-35,-4 -35,-22 -31,-40 -37,-50 -46,-36 -49,-18 -46,-4",
    "long": "-45,20 -50,-30 -38,-66 0,-78 38,-66 50,-30 45,20 40,-15 28,-38 -10,-60 -30,-38 "
    "-40,-15",
    "bob": "-47,35 -51,-30 -38,-66 0,-78 38,-66 51,-30 47,35 40,-10 34,-32 0,-36 -34,-32 -40,-10",
    "short": "-43,-10 -47,-35 -36,-64 0,-75 36,-64 47,-35 43,-10 38,-32 26,-47 0,-50 "
    "-26,-47 -38,-32",
    "quiff": "-43,-10 -47,-40 -46,-62 -28,-80 10,-86 40,-74 47,-45 43,-10 38,-34 24,-47 0,-48 "
    "-22,-42 -36,-34",
    "curls": "-44,-5 -53,-20 -50,-38 -50,-56 -36,-64 -24,-78 -8,-76 8,-82 24,-74 38,-68 48,-52 "
    "52,-34 52,-18 44,-5 38,-30 27,-36 15,-46 0,-43 -15,-48 -27,-38 -38,-28",
}
BEARDS = {
    "full": "-42,-2 -42,20 -30,44 0,56 30,44 42,20 42,-2 34,12 20,20 0,17 -20,20 -34,12",
    "moustache": "-22,28 -16,19 0,17 16,19 22,28 10,25 0,23 -10,25",
}
GLASSES = {
    "round": "-13,0 -9,-9 0,-12 9,-9 13,0 9,9 0,12 -9,9",
    "square": "-13,-7 0,-8 13,-7 14,0 11,8 0,9 -11,8 -14,0",
}
BODY = "-110,900 -108,500 -106,300 -104,200 -99,125 -82,91 -30,74 30,74 82,91 99,125 104,200 "
BODY += "106,300 108,500 110,900"


# ---------------------------------------------------------------- people and poses


def person(index):
    """Return who number `index` (from 0) is: a namespace with the TRAITS."""
    return SimpleNamespace(**dict(zip(TRAITS, PEOPLE[index])))


def random_pose(rng, x, y, side):
    """Return a pose whose face box has its centre near (x, y) and is `side` pixels wide.

    angle in degrees; turn, nod, lift (of the brows) and gaze shift parts by head units.
    """
    ranges = {"angle": (-7, 7), "turn": (-0.05, 0.05), "nod": (-0.03, 0.03), "smile": (0.05, 1)}
    ranges |= {"gape": (-0.08, 0.08), "lift": (-0.02, 0.03), "gaze": (-0.02, 0.02)}
    drawn = {key: rng.uniform(*limits) for key, limits in ranges.items()}
    return SimpleNamespace(x=x, y=y, side=side, **drawn | {"gape": max(0, drawn["gape"])})


def face_box(pose):
    """Return the square in which a Haar detector sees the face, in whole pixels, as a dict."""
    x, y = place([(0, 0)], pose, 1)[0] - pose.side / 2
    return {"x": round(x), "y": round(y), "w": round(pose.side), "h": round(pose.side)}


# ---------------------------------------------------------------- shapes


def place(points, pose, depth=0):
    """Turn points in head units into pixels. depth: 0 for the head's outline, 1 for the face."""
    x, y = (np.asarray(points, float) + (pose.turn * depth, pose.nod * depth)).T
    angle = np.radians(pose.angle)
    cos, sin = np.cos(angle), np.sin(angle)
    turned = np.stack([x * cos - y * sin, x * sin + y * cos], 1)
    return turned * pose.side / BOX + (pose.x, pose.y)


def fill(image, pose, points, colour, depth=0):
    """Fill a polygon given in head units, on an image SMOOTH times larger than the pose says."""
    outline = (place(points, pose, depth) * SMOOTH).ravel().tolist()
    ImageDraw.Draw(image).polygon(outline, fill=colour)


def glow(image, pose, x, y, width, height, colour, strength):
    """Blend a colour into the face: `strength` (0 to 1) amid an ellipse, nothing at its edge."""
    half = np.array((width, height)) * pose.side / BOX
    corners = place([(x, y)], pose, 1) + ([-half], [half])
    left, top, right, bottom = np.round(corners.ravel() * SMOOTH).astype(int)
    image.paste(colour, (left, top), soft_disc(strength).resize((right - left, bottom - top)))


@functools.cache
def soft_disc(strength):
    """Return a mask of 64 x 64 pixels: `strength` (0 to 1) in the middle, 0 at the edge."""
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    return Image.fromarray((255 * strength * np.clip(1 - x * x - y * y, 0, 1)).astype("uint8"))


@functools.cache
def curve(text, scale=1.0):
    """Return the Catmull-Rom spline through "x,y x,y …" in hundredths, x scaled: (8 n, 2)."""
    p = np.array([pair.split(",") for pair in text.split()], float) * (scale / 100, 0.01)
    a, b, c, d = (np.roll(p, n, 0) for n in (1, 0, -1, -2))
    t = np.linspace(0, 1, 8, endpoint=False)[:, None, None]
    square, cube = a - 2.5 * b + 2 * c - d / 2, 1.5 * (b - c) + (d - a) / 2
    spline = b + t * (c - a) / 2 + t**2 * square + t**3 * cube
    return spline.transpose(1, 0, 2).reshape(-1, 2)


def oval(x, y, width, height):
    """Return the outline of an ellipse with the given half axes."""
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([x + width * np.cos(t), y + height * np.sin(t)], 1)


def stroke(x0, y0, x1, y1, sag, thick):
    """Return the outline of a brush stroke that sags by `sag` and is pointed at both ends."""
    t = np.linspace(0, 1, 16)
    swell = 4 * t * (1 - t)
    upper, lower = (
        np.stack([x0 + (x1 - x0) * t, y0 + (y1 - y0) * t + sag * swell + half * np.sqrt(swell)], 1)
        for half in (-thick, thick)
    )
    return np.concatenate([upper, lower[::-1]])


def shade(colour, factor):
    """Make a colour "#rrggbb" darker (factor 0 to 1) or lighter (1 to 2); three: by channel."""
    rgb, factor = np.array(ImageColor.getrgb(colour)), np.array(factor)
    rgb = np.where(factor <= 1, rgb * factor, 255 - (255 - rgb) * (2 - factor))
    return "#{:02x}{:02x}{:02x}".format(*rgb.astype(int))


# ---------------------------------------------------------------- a person


def draw_figure(image, who, pose, shirt):
    """Draw a person from hair to shirt on an image SMOOTH times larger than `pose` says."""
    upright = SimpleNamespace(**vars(pose) | {"angle": pose.angle / 3})
    shape, soft = functools.partial(fill, image, pose), functools.partial(glow, image, pose)
    for lock in HAIR_BACK[who.style].split(" / "):
        shape(curve(lock, who.width / 0.42), shade(HAIRS[who.hair], 0.8), -0.3)
    draw_body(functools.partial(fill, image, upright), SKINS[who.skin], shirt)
    draw_head(shape, who, SKINS[who.skin])
    draw_light(soft, SKINS[who.skin])
    draw_face(shape, who, pose)
    draw_eyes(shape, who, pose)
    for lock in HAIR_FRONT[who.style].split(" / "):
        shape(curve(lock, who.width / 0.42), HAIRS[who.hair], 0.3)
    if who.style != "bald":
        shape(stroke(-0.28, -0.58, 0.16, -0.64, -0.05, 0.018), shade(HAIRS[who.hair], 1.14), 0.3)
    if who.glasses != "none":
        draw_glasses(shape, soft, who)


def draw_body(shape, skin, shirt):
    """Draw shirt and neck, down to far below any picture."""
    shape(curve(BODY), shirt)
    for side in (-1, 1):
        shape([(side * 0.76, 1.35), (side * 0.73, 9), (side * 0.79, 9)], shade(shirt, 0.8))
    shape(curve("-34,74 -20,90 0,99 20,90 34,74 0,60"), shade(shirt, 0.8))
    shape(curve("-20,30 -21,62 -29,76 -16,87 0,93 16,87 29,76 21,62 20,30"), shade(skin, 0.96))
    shape(curve("-20,30 -20,56 0,68 20,56 20,30"), shade(skin, 0.8))


def draw_head(shape, who, skin):
    """Draw ears and the bare face."""
    for side in (-1, 1):
        shape(oval(side * (who.width + 0.015), -0.03, 0.065, 0.11), shade(skin, 0.92), -0.3)
        shape(oval(side * (who.width + 0.025), -0.03, 0.03, 0.065), shade(skin, 0.76), -0.3)
    t = np.linspace(0, 2 * np.pi, 80)
    below = np.sin(t) > 0
    x = who.width * np.sign(np.cos(t)) * np.abs(np.cos(t)) ** np.where(below, who.jaw, 1)
    shape(np.stack([x, np.where(below, 0.53, 0.62) * np.sin(t) - 0.02], 1), skin)


def draw_light(soft, skin):
    """Darken eye sockets, lighten nose, cheeks and forehead: what a Haar detector looks for."""
    for side in (-1, 1):
        soft(side * 0.19, -0.12, 0.2, 0.14, shade(skin, (0.64, 0.5, 0.48)), 0.8)
        soft(side * 0.22, 0.13, 0.15, 0.12, shade(skin, 1.3), 0.6)
        soft(side * 0.25, 0.15, 0.13, 0.1, "#e0685a", 0.25)
    soft(0, -0.36, 0.32, 0.14, shade(skin, 1.3), 0.6)
    soft(0, -0.04, 0.08, 0.2, shade(skin, 1.35), 0.9)


def draw_face(shape, who, pose):
    """Draw beard, nose and mouth."""
    skin = SKINS[who.skin]
    if who.beard != "none":
        shape(curve(BEARDS[who.beard], who.width / 0.42), HAIRS[who.hair], 0.7)
    shape(stroke(-0.085, 0.115, 0.085, 0.115, 0.045, 0.018), shade(skin, 0.62), 1.5)
    shape(oval(0, 0.09, 0.055, 0.045), shade(skin, 1.12), 1.6)
    half, sag = 0.14 + 0.03 * pose.smile, 0.05 * pose.smile
    gape = sag + pose.gape / 2, 0.018 + pose.gape / 2
    shape(stroke(-half, 0.285, half, 0.285, *gape), "#8a3038", 1)
    if pose.gape > 0.02:
        shape(stroke(-half * 0.8, 0.28, half * 0.8, 0.28, sag + 0.008, 0.013), "#fbf6ee", 1)


def draw_eyes(shape, who, pose):
    """Draw eyes and brows; the brows of fair hair are darker than it, as most people's are."""
    brow = shade(HAIRS[who.hair], 0.6 if who.hair in ("blond", "grey") else 0.75)
    for side in (-1, 1):
        x = side * 0.19
        shape(curve("-9,0 -5,-5 0,-6 5,-5 9,0 0,5") + (x, -0.09), "#f3eee8", 1)
        shape(oval(x + pose.gaze, -0.097, 0.046, 0.05), "#33231f", 1)
        shape(oval(x + pose.gaze - 0.014, -0.115, 0.014, 0.014), "#ffffff", 1)
        shape(stroke(x - 0.1, -0.085, x + 0.1, -0.085, -0.062, 0.013), "#2a2023", 1)
        ends = (x - side * 0.1, -0.205 - pose.lift, x + side * 0.13, -0.2 - pose.lift)
        shape(stroke(*ends, -0.035, who.brow), brow, 1)


def draw_glasses(shape, soft, who):
    """Draw thin grey frames: black ones hide the face from a Haar detector."""
    frame = "#62606a"
    for side in (-1, 1):
        soft(side * 0.195, -0.1, 0.14, 0.12, "#ffffff", 0.12)
        outer = curve(GLASSES[who.glasses]) * (side, 1)
        ring = np.concatenate([outer, outer[:1], outer[:1] * 0.88, outer[::-1] * 0.88])
        shape(ring + (side * 0.195, -0.09), frame, 1.2)
        shape(stroke(side * 0.32, -0.11, side * who.width, -0.1, 0, 0.014), frame, 1)
    shape(stroke(-0.08, -0.1, 0.08, -0.1, -0.03, 0.014), frame, 1.2)


# ---------------------------------------------------------------- pictures and film


def draw_room(rng, width, height):
    """Return a wall with windows, pictures and shelves, out of focus: an RGB image of that size."""
    image = Image.new("RGB", (width, height), rng.choice(WALLS))
    draw = ImageDraw.Draw(image)
    count = round(3 * width / height)
    for x in (np.arange(-1, count) + rng.uniform(0, 1)) * width / count:
        w, h = rng.uniform(0.6, 0.85, 2) * width / count
        draw_thing = (draw_picture, draw_window, draw_shelf)[rng.integers(3)]
        draw_thing(rng, draw, x, rng.uniform(-0.05, 0.55) * height, w, h)
    return image.filter(ImageFilter.GaussianBlur(height / 100))


def draw_picture(rng, draw, x, y, w, h):
    """Hang a framed picture."""
    frame, paper, hill = rng.choice(SHIRTS, 3, replace=False)
    draw.rectangle((x, y, x + w, y + h), shade(frame, 0.7))
    draw.rectangle((x + w * 0.06, y + w * 0.06, x + w * 0.94, y + h - w * 0.06), "#f2ede2")
    draw.rectangle((x + w * 0.18, y + w * 0.18, x + w * 0.82, y + h - w * 0.18), shade(paper, 1.3))
    draw.rectangle((x + w * 0.18, y + h * 0.55, x + w * 0.82, y + h - w * 0.18), hill)


def draw_window(rng, draw, x, y, w, h):
    """Draw a window of four panes."""
    draw.rectangle((x, y, x + w, y + h), "#f4efe6")
    for column in (0.06, 0.53):
        for row in (0.06, 0.53):
            pane = x + w * column, y + h * row, x + w * (column + 0.41), y + h * (row + 0.41)
            draw.rectangle(pane, shade("#a9cfe6", rng.uniform(0.9, 1.3)))


def draw_shelf(rng, draw, x, y, w, h):
    """Draw a row of books on a board."""
    left = x
    while left < x + w * 0.85:
        wide, high = rng.uniform(0.07, 0.13) * w, rng.uniform(0.5, 0.9) * h
        book = shade(rng.choice(SHIRTS), rng.uniform(0.75, 1.1))
        draw.rectangle((left, y + h - high, left + wide, y + h), book)
        left += wide * 1.05
    draw.rectangle((x - w * 0.1, y + h, x + w * 1.1, y + h * 1.07), "#8a6544")


def light(rng, width, height, strength=1.0):
    """Return factors (height, width, 3) for pixels: brightness, warmth, one side lit more."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    low, high = (-0.2, -0.1, -0.4, -0.06), (0.2, 0.1, 0.06, 0.06)
    side_x, side_y, gain, warm = strength * rng.uniform(low, high)
    return (np.exp(gain) * (1 + side_x * x + side_y * y))[..., None] * (1 + warm, 1, 1 - warm)


def draw_scene(room, lit, noise, faces):
    """Return the picture of people in a room.

    lit: the factors of `light`; noise: is added; faces: [(person's index, pose, shirt colour)].
    """
    image = room.resize((room.width * SMOOTH, room.height * SMOOTH), Image.Resampling.NEAREST)
    for index, pose, shirt in faces:
        draw_figure(image, person(index), pose, shirt)
    pixels = np.asarray(image.reduce(SMOOTH)) * lit + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype("uint8"))


def draw_person(index, rng, size=SIDE):
    """Return a training picture of a person, all else by lot from `rng`: RGB, size x size."""
    side = size / rng.uniform(1.8, 2.2)
    pose = random_pose(rng, *(size / 2 + rng.uniform(-0.06, 0.06, 2) * side), side)
    noise = rng.normal(0, rng.uniform(0, 5), (size, size, 1))
    face = index, pose, rng.choice(SHIRTS)
    image = draw_scene(draw_room(rng, size, size), light(rng, size, size), noise, [face])
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0, size / 160)))


def draw_set(folder, people=5, pictures=40, seed=SEED):
    """Draw folder/<name>/<nnn>.jpg, `pictures` of each of the first `people`.

    Raises UserError if the folder holds files that this would not write.
    """
    pairs = [(i, n) for i in range(people) for n in range(pictures)]
    wanted = {Path(folder, person(i).name, f"{n:03}.jpg"): (i, n) for i, n in pairs}
    if others := set(utils.list_files(folder)) - set(wanted):
        hint = "is not of this set: choose a new folder or remove it"
        raise utils.UserError(f"{utils.escape(min(others))}: {hint}")
    for path, (index, number) in utils.progress(wanted.items(), len(wanted), "drawing"):
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_person(index, np.random.default_rng([seed, index, number])).save(path, quality=92)


def film_poses(rng, frames, left, right):
    """Return a pose for each frame of somebody between two x; by turns they stand and move."""
    from scipy.interpolate import PchipInterpolator

    largest = min(120, (right - left) / 2.2)
    keys, times = [], []
    while not times or times[-1] < frames:
        side = rng.uniform(0.66, 1) * largest
        x = rng.uniform(left + largest * 0.8, right - largest * 0.8)
        pose = tuple(vars(random_pose(rng, x, rng.uniform(170, 250), side)).values())
        keys += [pose, np.array(pose) * rng.uniform(0.98, 1.02)]
        times += [times[-1] + rng.uniform(15, 30) if times else 0]
        times += [times[-1] + rng.uniform(10, 25)]
    names = vars(random_pose(np.random.default_rng(0), 0, 0, 0))
    between = PchipInterpolator(times, keys)(range(frames))
    return [SimpleNamespace(**dict(zip(names, row))) for row in between]


def draw_clip(path, people=(0, 1), seconds=SECONDS, seed=SEED):
    """Write a film in which these people move side by side; beside it as .json, return the truth.

    That is, for each frame, a list of {"name", "x", "y", "w", "h"}: face boxes in pixels.
    Raises UserError where OpenCV cannot write such a film.
    """
    import cv2

    rng, frames = np.random.default_rng([seed, *people]), round(seconds * FPS)
    width, height = FRAME
    room, lit = draw_room(rng, width, height), light(rng, width, height, 0.5)
    shirts = rng.permutation(SHIRTS)
    zone, truth = width / len(people), []
    poses = [film_poses(rng, frames, zone * n, zone * (n + 1)) for n in range(len(people))]
    with utils.atomic_write(path) as part:
        code = cv2.VideoWriter.fourcc(*CODECS[Path(path).suffix])
        film = cv2.VideoWriter(str(part), code, FPS, FRAME)
        if not film.isOpened():
            kind = "OpenCV cannot write this kind of film: try .avi"
            raise utils.UserError(f"{utils.escape(path)}: {kind}")
        for now in zip(*poses):
            noise = rng.normal(0, 2, (height, width, 1))
            image = draw_scene(room, lit, noise, list(zip(people, now, shirts)))
            film.write(np.ascontiguousarray(np.asarray(image)[..., ::-1]))
            truth.append([{"name": person(i).name} | face_box(p) for i, p in zip(people, now)])
        film.release()
    text = json.dumps(truth, ensure_ascii=False)
    Path(path).with_suffix(".json").write_text(text, encoding="utf-8")
    return truth


# ---------------------------------------------------------------- the command


def film_name(text):
    """Read a path that ends as a film can."""
    if Path(text).suffix not in CODECS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(CODECS)}")
    return Path(text)


def main():
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(
        description="Draw a training set of cartoon faces, to try the kit with.",
        epilog="example: python tests/sample_faces.py people --clip people.mp4",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    people, pictures = utils.number(int, 1, len(PEOPLE)), utils.number(int, 1, 1000)
    parser.add_argument("out_dir", type=Path, help="gets a folder of pictures for each person")
    parser.add_argument("--people", type=people, default=5, metavar="N", help="how many people")
    parser.add_argument("--pictures", type=pictures, default=40, metavar="N", help="of each person")
    film = "also a film (.mp4 or .avi) of the first two"
    parser.add_argument("--clip", type=film_name, metavar="FILE", help=film)
    args = parser.parse_args()
    draw_set(args.out_dir, args.people, args.pictures)
    pictures = f"{args.people * args.pictures} pictures of {args.people} people"
    utils.print_line(f"{pictures} in {utils.escape(args.out_dir)}")
    if args.clip:
        draw_clip(args.clip, range(min(2, args.people)))
        boxes = "its true face boxes beside it as .json"
        utils.print_line(f"film in {utils.escape(args.clip)}, {boxes}")


if __name__ == "__main__":
    utils.run(main)
