"""Cut out the faces that people have named in a photo program; `webcam.py --by-name` calls this.

Names and boxes stand in the XMP metadata of a picture, in an XMP file beside it (a sidecar), or in
Picasa's .picasa.ini. No face is looked for, and no model is needed.

    MWG regions         digiKam, Lightroom, Picasa, and Apple Photos when it exports
    Microsoft People    Windows Photo Gallery, digiKam
    .picasa.ini         Picasa

Boxes are fractions of the picture as it is stored, before EXIF turns it. Metadata that cannot be
read never costs the picture.

A crop is 2.2 boxes wide, and shows what the tagger's crop of 2.0 Haar boxes shows. Measured on 339
faces (press photos, webcam films), each with two detectors like those of such programs
(libfacedetection, MTCNN): the side of the Haar box is 1.07 to 1.11 times the root of width x height
of their box (medians; 0.95 to 1.19 for eight of ten), and the centres lie 2 % apart.
"""

import collections
import contextlib
import hashlib
import io
import math
import os
import re
import struct
import unicodedata
import zlib
from typing import NamedTuple

from defusedxml import ElementTree

import imaging
import utils

RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
MWG = "{http://www.metadataworkinggroup.com/schemas/regions/}"
AREA = "{http://ns.adobe.com/xmp/sType/Area#}"
DIMENSIONS = "{http://ns.adobe.com/xap/1.0/sType/Dimensions#}"
PEOPLE = "{http://ns.microsoft.com/photo/1.2/t/RegionInfo#}"
PERSON = "{http://ns.microsoft.com/photo/1.2/t/Region#}"
# A text chunk of a PNG: whether it is packed, names of two languages, the packet.
PNG_XMP = re.compile(rb"XML:com\.adobe\.xmp\0(.).[^\0]*\0[^\0]*\0(.*)", re.DOTALL)

MAX_XMP, MAX_DEPTH = 2**22, 100  # bytes; elements in each other. Real ones have 20 kB and 12
MAX_REGIONS = 1000  # of a picture
NO_SIZE = (math.nan, math.nan)  # where no size is told
MIN_SIDE = 48  # pixels of a box, as in the collector
HAAR_BOX = 1.1  # a Haar box of webcam.py is so many times as large as a photo program's
ORIENTATION = 0x0112  # the EXIF tag


class Region(NamedTuple):
    """A region of a picture that a program has stored."""

    name: str  # "" if nobody has named it
    kind: str  # face, or pet, focus, barcode…
    box: tuple  # centre x and y, width, height as fractions of the stored picture; nan if not told
    drawn_on: tuple  # width and height of the picture at that time, in pixels; nan if not told


# ---------------------------------------------------------------- files → packets


def read_regions(path, picasa):
    """Return the Regions that programs have stored for a file, at most MAX_REGIONS.

    picasa: what read_picasa returns. A sidecar comes before what is in the picture, for it was
    written later.
    """
    found = []
    for name in (f"{path.name}.xmp", f"{path.stem}.xmp"):
        sidecar = path.with_name(name)
        found += parse_xmp(read_beside(sidecar), sidecar)
    with contextlib.suppress(imaging.PictureError):
        found += parse_xmp(embedded_xmp(*imaging.read_picture(path)), path)
    found += picasa.get(str(path).casefold(), ())
    return distinct(found[:MAX_REGIONS])


def read_beside(path):
    """Return the first MAX_XMP + 1 bytes of a file beside a picture, none if it cannot be read."""
    with contextlib.suppress(OSError):
        if path.is_file():
            with open(path, "rb") as file:
                return file.read(MAX_XMP + 1)
    return b""


def embedded_xmp(data, image):
    """Return the XMP packet in a picture. data: its bytes; image: what open_picture returns."""
    if not data.startswith(imaging.PNG_SIGNATURE):
        packet = image.info.get("xmp", b"")  # a TIFF may have anything here
        return packet if isinstance(packet, bytes) else str(packet).encode("latin-1", "replace")
    for kind, chunk in imaging.png_chunks(data):  # open_picture leaves its texts out
        if kind == b"iTXt" and (text := PNG_XMP.fullmatch(chunk[8:-4])):
            is_packed, packet = text.groups()
            if is_packed == b"\1":
                with contextlib.suppress(zlib.error):
                    packet = zlib.decompressobj().decompress(packet, MAX_XMP + 1)
            return packet
    return b""


# ---------------------------------------------------------------- packets → regions


def parse_xmp(packet, path):
    """Return the Regions in an XMP packet; none, with a warning, if it is hostile or broken.

    A packet without regions is not even parsed.
    """
    if b"Region" not in packet:
        return []
    try:
        return find_regions(parse_xml(packet))
    except (ValueError, SyntaxError, LookupError) as error:  # LookupError: an unknown encoding
        reason = utils.first_line(error)
        utils.warn(f"{utils.escape(path)}: the names in its metadata are not read: {reason}")
    return []


def parse_xml(data):
    """Return the root element. Raises ValueError or SyntaxError for what is hostile or broken."""
    if len(data) > MAX_XMP:
        raise ValueError(f"larger than {MAX_XMP:,} bytes")
    file = io.BytesIO(data.strip(b"\0\r\n\t "))
    events = ("start", "end")
    parser = ElementTree.iterparse(file, events, forbid_dtd=True)
    depth = 0
    for event, _ in parser:
        depth += 1 if event == "start" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} elements")
    return parser.root


def find_regions(root):
    """Return the Regions below the root element of an XMP packet."""
    found = []
    size = NO_SIZE
    for node in root.iter(f"{MWG}AppliedToDimensions"):
        size = numbers([field(node, DIMENSIONS + key) for key in "wh"], 2)
    for item in list_items(root, f"{MWG}RegionList"):
        box = numbers([field(item, AREA + key) for key in "xywh"], 4)
        kind = field(item, f"{MWG}Type").lower()
        found.append(Region(field(item, f"{MWG}Name"), kind, box, size))
    for item in list_items(root, f"{PEOPLE}Regions"):
        name = field(item, f"{PERSON}PersonDisplayName")
        left, top, w, h = numbers(field(item, f"{PERSON}Rectangle").split(","), 4)
        found.append(Region(name, "face", (left + w / 2, top + h / 2, w, h), size))
    return found


def list_items(root, tag):
    """Return the items of the RDF lists in the elements `tag`."""
    return [item for found in root.iter(tag) for item in found.findall(f"*/{RDF}li")]


def field(node, name):
    """Return the text of a field of an RDF structure, "" if it has none.

    RDF has several ways to write it: an attribute or an element, of the structure's own element
    or of an rdf:Description in it.
    """
    for part in node.iter():
        if name in part.attrib:
            return part.attrib[name].strip()
        if part.tag == name and part.text:
            return part.text.strip()
    return ""


def numbers(texts, count):
    """Return `count` floats, all nan if that is not what the texts are."""
    with contextlib.suppress(ValueError):
        if len(texts) == count:
            return tuple(float(text) for text in texts)
    return (math.nan,) * count


def read_picasa(files):
    """Return {casefolded path: Regions} of the .picasa.ini files beside `files`."""
    names, faces, found = {}, [], collections.defaultdict(list)
    for folder in sorted({path.parent for path in files}):
        text = read_beside(folder / ".picasa.ini").decode(errors="replace")
        _, *parts = re.split(r"^\[(.*)\]\s*$", text, flags=re.MULTILINE)
        for section, lines in zip(parts[::2], parts[1::2]):
            if section == "Contacts2":
                names |= re.findall("^0*([0-9a-f]+)=([^;\r\n]*)", lines, re.MULTILINE)
            for line in re.findall("^faces=(.*)", lines, re.MULTILINE):
                faces.append((str(folder / section).casefold(), line))
    for path, line in faces:
        for sides, person in re.findall(r"rect64\(([0-9a-f]{1,16})\),0*([0-9a-f]*)", line):
            corners = struct.unpack(">4H", bytes.fromhex(sides.zfill(16)))
            left, top, right, bottom = (number / 65535 for number in corners)
            box = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
            found[path].append(Region(names.get(person, "").strip(), "face", box, NO_SIZE))
    return found


def distinct(regions):
    """Return Regions without those that another program has drawn around the same face.

    The first one stays, under the first name that any of them has.
    """
    kept = []
    for region in regions:
        region = region._replace(name=unicodedata.normalize("NFC", region.name))
        for place, other in enumerate(kept):
            if is_same_face(region, other):
                kept[place] = other._replace(name=other.name or region.name)
                break
        else:
            kept.append(region)
    return kept


def is_same_face(a, b):
    """Say whether two Regions have centres less than half a box apart.

    They may be of a pet, for Microsoft's format does not tell pets from persons.
    """
    (ax, ay, aw, ah), (bx, by, bw, bh) = a.box, b.box
    is_near = abs(ax - bx) < min(aw, bw) / 2 and abs(ay - by) < min(ah, bh) / 2
    return a == b or (is_near and {a.kind, b.kind} <= {"face", "pet"})


# ---------------------------------------------------------------- regions → boxes


def find_orientation(image):
    """Return the EXIF orientation, 1 to 8, by which imaging.upright or HEIC's decoder turns it.

    image: a PIL image of which only the header has been read.
    """
    with contextlib.suppress(Exception):  # a broken EXIF block, as in imaging.apply_orientation
        value = image.info.get("original_orientation") or image.getexif().get(ORIENTATION)
        return value if value in range(1, 9) else 1
    return 1


def turn(box, orientation):
    """Return a box as fractions of the upright picture."""
    x, y, w, h = box
    if orientation > 4:
        x, y, w, h = y, x, h, w
    if orientation in (2, 3, 6, 7):
        x = 1 - x
    if orientation in (3, 4, 7, 8):
        y = 1 - y
    return x, y, w, h


def box_in_picture(region, orientation, size):
    """Return (box, None) or (None, the reason why there is no face of use).

    size: width and height of the upright picture. box: centre x and y, width, height in its pixels.
    Programs store the size of the picture in which a box was drawn. If that has the shape of the
    stored picture, the box is turned as EXIF says; if it has the shape of the upright one, the box
    is upright already. With any other shape the picture was changed since: the box is of no use.
    """
    if region.kind != "face":
        return None, "not marked as a face (a pet, say)"
    if imaging.is_other_shape(region.drawn_on, size[::-1] if orientation > 4 else size):
        if imaging.is_other_shape(region.drawn_on, size):
            return None, "the picture was cropped or turned after the face was named"
        orientation = 1
    x, y, w, h = turn(region.box, orientation)
    if not (0 <= x <= 1 and 0 <= y <= 1 and 0 < w <= 1 and 0 < h <= 1):
        return None, "no box, or one that makes no sense"
    if math.sqrt(w * size[0] * h * size[1]) < MIN_SIDE:
        return None, f"smaller than {MIN_SIDE} pixels"
    return (x * size[0], y * size[1], w * size[0], h * size[1]), None


# ---------------------------------------------------------------- boxes → crops


def cut_faces(path, picasa, context):
    """Return triples (Region, square around the face or None, reason why there is none) of a file.

    context: side of the square in Haar boxes. The square is uint8 (n, n, 3).
    """
    regions = read_regions(path, picasa)
    if not regions:
        return []
    try:
        image = imaging.read_picture(path)[1]
        orientation = find_orientation(image)
        picture = imaging.upright(image)
    except imaging.PictureError as error:
        return [(region, None, f"the picture cannot be read: {error}") for region in regions]
    faces = []
    for region in regions:
        box, reason = box_in_picture(region, orientation, picture.size)
        crop = None
        if box:
            x, y, w, h = box
            crop = imaging.crop_square(picture, x, y, context * HAAR_BOX * math.sqrt(w * h))
        faces.append((region, crop, reason))
    return faces


def crop_name(path, region):
    """Return the name of a face's file: the same in every run, another one for every face."""
    stem = path.stem[:40]
    place = " ".join(f"{number:.3f}" for number in region.box)
    digest = hashlib.sha256(os.fsencode(path.resolve()) + place.encode()).hexdigest()
    return f"{utils.folder_name(stem)}-{digest[:10]}.jpg"


def save_named_faces(files, out, context):
    """Cut the faces that are named in `files` into `out`/<name>/, unnamed ones into `out`/unknown/.

    context: side of a crop in Haar boxes. Prints a table of the names, and why others are left out.
    """
    files = [path for path in files if path.suffix.lower() != ".xmp"]
    picasa = read_picasa(files)
    folders, counts, skipped = {"": utils.UNKNOWN}, collections.Counter(), collections.Counter()
    work = utils.ordered_parallel_map(
        lambda path: cut_faces(path, picasa, context), files, imaging.THREADS
    )
    for path, faces in utils.progress(zip(files, work), len(files), "files"):
        for region, crop, reason in faces:
            if reason:
                skipped[reason] += 1
                continue
            if region.name not in folders:
                folders |= utils.folder_names([region.name], taken=folders.values())
            folder = folders[region.name]
            (out / folder).mkdir(parents=True, exist_ok=True)
            with utils.atomic_write(out / folder / crop_name(path, region)) as part:
                imaging.save_jpeg(part, crop)
            counts[folder] += 1
    nobody = "no faces: no photo program has left names in these pictures"
    utils.print_people(counts, skipped, nobody, out)
