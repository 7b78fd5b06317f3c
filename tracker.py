"""From frames to boxes to tracks: the face detector, and who is followed (webcam.py)."""

import itertools
from dataclasses import dataclass

import cv2
import numpy as np

import imaging

SCALE_FACTOR = 1.2  # between two sizes of the face detector
MIN_NEIGHBORS_START = 6  # overlapping detections that begin a track
MIN_NEIGHBORS_KEEP = 2  # and that keep it going
SCAN_EVERY = 10  # frames between searches of the whole picture while a face is followed
FEW_TRACKS = 6  # with more, searching near each costs more than searching the whole picture
DETECT_FACE = 60  # pixels that the smallest face looked for has in the picture that is searched
# Intersection over union from which on two boxes are one face: a face that moves by more than about
# half its width from one frame to the next begins a new track, however long the gap between them.
MIN_IOU = 0.25
SMOOTHING_IOU = 0.75  # above it a face hardly moves: its box is averaged, so that it does not jump
MAX_MISSED = 0.3  # seconds that a face may be hidden before its track ends
MAX_MISSED_ONCE = 0.6  # the same if that was in one frame only: on slow machines these are rare


@dataclass(eq=False)
class Track:
    """One face followed from frame to frame."""

    id: int
    box: tuple  # x, y, width, height in pixels of the source
    seen: float  # timestamp of the frame in which it was found last
    since: float  # timestamp of the first one
    mean: np.ndarray | float = 0.0  # running mean of its probabilities, (classes,)
    classifications: int = 0
    agreeing: int = 0  # classifications since its label changed
    classified: int = -(10**9)  # index of the frame classified last
    classified_at: float = 0.0  # and its timestamp
    label: str = ""
    best: str = ""  # the most probable class
    probability: float = float("nan")  # of that class
    kept_at: float = -(10.0**9)  # timestamp of the crop kept last
    kept: tuple = ()  # and its thumbnail and box
    reported: tuple = ()  # label, probability and since when, as --events printed them last


# ---------------------------------------------------------------- frames → boxes


def shrink(image, smallest):
    """Return the grey picture to search and its scale: `smallest` px become DETECT_FACE px."""
    scale = min(1.0, DETECT_FACE / smallest)
    size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), scale


def detect(grey, scale, smallest, largest=0):
    """Find faces of `smallest` to `largest` (0: any) source pixels in a grey picture.

    Returns [(box in source pixels, neighbors)]; the neighbors say how sure the cascade is.
    """
    if min(grey.shape) < 24:
        return []
    least, most = ((round(side * scale),) * 2 for side in (smallest, largest))
    boxes, neighbors = imaging.load_cascade().detectMultiScale2(
        grey, SCALE_FACTOR, MIN_NEIGHBORS_KEEP, minSize=least, maxSize=most
    )
    return [(tuple(round(v / scale) for v in box), int(n)) for box, n in zip(boxes, neighbors)]


def detect_with_flip(grey, scale, smallest):
    """Find faces as `detect` does, with the mean neighbors of a picture and its mirror image.

    A picture is seen only once, and what is no face is seldom taken for one both ways round: of 448
    flowers 7 instead of 11 show a "face", at the same recall (0.937 and 0.934 of the heads in
    single frames of 14 films).
    """
    width = round(grey.shape[1] / scale)
    found = []
    mirrored = detect(cv2.flip(grey, 1), scale, smallest)
    for (x, y, w, h), n in detect(grey, scale, smallest):
        twin = width - x - w, y, w, h
        others = [m for other, m in mirrored if iou(twin, other) > MIN_IOU]
        found.append(((x, y, w, h), (n + max(others, default=0)) / 2))
    return found


def detect_near(grey, scale, box):
    """Find faces around a known box (source pixels) of about its size, as `detect` does."""
    x, y, w, h = (v * scale for v in box)
    left, top = max(0, round(x - w / 2)), max(0, round(y - h / 2))
    part = grey[top : round(y + 1.5 * h), left : round(x + 1.5 * w)]
    right, down = round(left / scale), round(top / scale)
    found = detect(part, scale, 0.75 * box[2], 1.35 * box[2])
    return [((x + right, y + down, w, h), n) for (x, y, w, h), n in found]


# ---------------------------------------------------------------- boxes → tracks


def iou(a, b):
    """Return intersection over union of two boxes (x, y, w, h)."""
    width, height = (min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = max(0, width) * max(0, height)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def distinct_faces(found):
    """Return [(box, neighbors)] without those that overlap a surer one."""
    found = sorted(found)  # of equally sure ones always the same is kept
    kept = cv2.dnn.NMSBoxes([box for box, _ in found], [n for _, n in found], 0, MIN_IOU)
    return [found[n] for n in kept]


def match_boxes(old, new):
    """Match boxes of two frames so that the sum of IoUs is largest. Returns {index: new index}."""
    from scipy.optimize import linear_sum_assignment

    if not old or not new:
        return {}
    ious = np.array([[iou(a, b) for b in new] for a in old])
    pairs = zip(*linear_sum_assignment(-ious))
    return {i: j for i, j in pairs if ious[i, j] >= MIN_IOU}


class Tracker:
    """Follows the faces of one film, camera or stream, or finds those of one picture.

    whole: the whole picture is the only "face".
    """

    def __init__(self, whole=False, min_face=None):
        self.whole, self.min_face = whole, min_face
        self.tracks = []
        self.ids = itertools.count()
        self.size = ()  # of the last frame
        self.smallest = 0  # face looked for, pixels
        self.scanned = 0  # index of the frame of which the whole was searched last
        self.previous = 0.0  # timestamp of the last frame

    def update(self, frame):
        """Return the tracks after a Frame."""
        size = frame.image.shape[1::-1]
        if self.size != size:  # the first frame, or a film that changes its size
            self.size = size
            self.tracks = []
            self.smallest = self.min_face or max(40, size[1] // 8)
        self.update_tracks(self.detect(frame), frame.timestamp)
        return self.tracks

    def detect(self, frame):
        """Find faces: in the whole picture now and then, else only near the tracks."""
        if self.whole:
            return [((0, 0, *self.size), MIN_NEIGHBORS_START)]
        grey, scale = shrink(frame.image, self.smallest)
        if frame.path:
            found = detect_with_flip(grey, scale, self.smallest)
        elif frame.index - self.scanned >= SCAN_EVERY or not 0 < len(self.tracks) <= FEW_TRACKS:
            found = detect(grey, scale, self.smallest)
            self.scanned = frame.index
        else:
            boxes = [track.box for track in self.tracks]
            found = [face for box in boxes for face in detect_near(grey, scale, box)]
        return distinct_faces(found)

    def update_tracks(self, faces, timestamp):
        """Match faces to the tracks, end those that are lost, and begin new ones."""
        matches = match_boxes([track.box for track in self.tracks], [box for box, _ in faces])
        for old, new in matches.items():
            track, box = self.tracks[old], faces[new][0]
            if iou(box, track.box) > SMOOTHING_IOU:
                box = tuple(round((a + b) / 2) for a, b in zip(box, track.box))
            track.box, track.seen = box, timestamp
        self.tracks = [track for track in self.tracks if not self.is_lost(track, timestamp)]
        for box, neighbors in sorted(faces):
            free = all(iou(box, track.box) < MIN_IOU for track in self.tracks)
            if free and neighbors >= MIN_NEIGHBORS_START:
                self.tracks.append(Track(next(self.ids), box, timestamp, timestamp))
        self.previous = timestamp

    def is_lost(self, track, timestamp):
        """Say whether a track has ended: in seconds, however many frames come."""
        missed_once = track.seen == self.previous
        limit = MAX_MISSED_ONCE if missed_once else MAX_MISSED
        return timestamp - track.seen > limit + 1e-6
