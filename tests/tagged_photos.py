"""Writes photos with names in them, each as one photo program writes them, after its documents.

    tag_photo(Path("a.jpg"), upright PIL image, [("Ann", (x, y, side))], "digiKam", orientation=6)

A face's box is its centre and side in pixels of the upright picture.
"""

import numpy as np
import pillow_heif
from photos_library import STORED
from PIL import Image, PngImagePlugin, TiffImagePlugin

pillow_heif.register_heif_opener()
XMP, ORIENTATION = 700, 274  # TIFF tags
NAMESPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "mwg-rs": "http://www.metadataworkinggroup.com/schemas/regions/",
    "stArea": "http://ns.adobe.com/xmp/sType/Area#",
    "stDim": "http://ns.adobe.com/xap/1.0/sType/Dimensions#",
    "MP": "http://ns.microsoft.com/photo/1.2/",
    "MPRI": "http://ns.microsoft.com/photo/1.2/t/RegionInfo#",
    "MPReg": "http://ns.microsoft.com/photo/1.2/t/Region#",
    "apple-fi": "http://ns.apple.com/faceinfo/1.0/",
}


def packet(body):
    """Return an XMP packet around RDF properties, as bytes."""
    spaces = " ".join(f'xmlns:{prefix}="{uri}"' for prefix, uri in NAMESPACES.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {spaces}>'
        f'<rdf:Description rdf:about="">{body}</rdf:Description>'
        '</rdf:RDF></x:xmpmeta>\n   \n<?xpacket end="w"?>'
    ).encode()


def lightroom(faces, size, kind="Face"):
    """MWG regions in attributes, each in an rdf:Description."""
    items = "".join(
        f'<rdf:li><rdf:Description mwg-rs:Rotation="0.00000" mwg-rs:Type="{kind}"'
        + (f' mwg-rs:Name="{name}"' if name else "")
        + f'><mwg-rs:Area stArea:x="{x:.5f}" stArea:y="{y:.5f}" stArea:w="{w:.5f}"'
        f' stArea:h="{h:.5f}"/></rdf:Description></rdf:li>'
        for name, (x, y, w, h) in faces
    )
    applied = f'stDim:w="{size[0]}" stDim:h="{size[1]}" stDim:unit="pixel"'
    return (
        f'<mwg-rs:Regions rdf:parseType="Resource"><mwg-rs:AppliedToDimensions {applied}/>'
        f"<mwg-rs:RegionList><rdf:Bag>{items}</rdf:Bag></mwg-rs:RegionList></mwg-rs:Regions>"
    )


def apple(faces, size, kind="Face"):
    """MWG regions in elements, in a sequence, with fields of Apple's own."""
    resource = ' rdf:parseType="Resource"'
    items = "".join(
        f"<rdf:li{resource}><mwg-rs:Extensions{resource}><apple-fi:FaceID>7</apple-fi:FaceID>"
        f"</mwg-rs:Extensions><mwg-rs:Area{resource}><stArea:y>{y}</stArea:y>"
        f"<stArea:w>{w}</stArea:w><stArea:x>{x}</stArea:x><stArea:h>{h}</stArea:h>"
        f"<stArea:unit>normalized</stArea:unit></mwg-rs:Area><mwg-rs:Type>{kind}</mwg-rs:Type>"
        + (f"<mwg-rs:Name>{name}</mwg-rs:Name>" if name else "")
        + "</rdf:li>"
        for name, (x, y, w, h) in faces
    )
    return (
        f"<mwg-rs:Regions{resource}><mwg-rs:RegionList><rdf:Seq>{items}</rdf:Seq>"
        f"</mwg-rs:RegionList><mwg-rs:AppliedToDimensions{resource}><stDim:h>{size[1]}</stDim:h>"
        f"<stDim:w>{size[0]}</stDim:w><stDim:unit>pixel</stDim:unit></mwg-rs:AppliedToDimensions>"
        "</mwg-rs:Regions>"
    )


def windows(faces, size):
    """Microsoft People: the corner and the size of a box; nothing says for which picture."""
    items = "".join(
        f'<rdf:li MPReg:Rectangle="{x - w / 2:.6f}, {y - h / 2:.6f}, {w:.6f}, {h:.6f}"'
        + (f' MPReg:PersonDisplayName="{name}"' if name else "")
        + "/>"
        for name, (x, y, w, h) in faces
    )
    return (
        f'<MP:RegionInfo rdf:parseType="Resource"><MPRI:Regions><rdf:Bag>{items}</rdf:Bag>'
        "</MPRI:Regions></MP:RegionInfo>"
    )


def digikam(faces, size):
    """Both of them, the same faces."""
    return windows(faces, size) + lightroom(faces, size)


def picasa(faces, file):
    """Return the text of a .picasa.ini for one file. Picasa drops zeros at the front of a box."""
    contacts, boxes = ["[Contacts2]"], []
    for number, (name, (x, y, w, h)) in enumerate(faces, 1):
        sides = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        digits = "".join(f"{round(side * 65535):04x}" for side in sides).lstrip("0")
        person = f"{number:x}b8e4117cf1d6615" if name else "ffffffffffffffff"
        contacts += [f"{person}={name};;"] * bool(name)
        boxes.append(f"rect64({digits}),{person}")
    return "\n".join([*contacts, f"[{file}]", "star=yes", f"faces={';'.join(boxes)}", ""])


PROGRAMS = {"Lightroom": lightroom, "Apple": apple, "Windows": windows, "digiKam": digikam}


def stored_box(size, box, orientation):
    """Return a box (centre, side) as fractions (centre x, y, width, height) of the stored picture.

    A picture of the box is turned, and the box is found in it again.
    """
    x, y, side = box
    pixels = np.zeros((size[1], size[0]), "uint8")
    pixels[round(y - side / 2) : round(y + side / 2), round(x - side / 2) : round(x + side / 2)] = 1
    image = Image.fromarray(pixels)
    stored = image.transpose(STORED[orientation]) if orientation in STORED else image
    left, top, right, bottom = stored.getbbox()
    width, height = stored.size
    center = (left + right) / 2 / width, (top + bottom) / 2 / height
    return (*center, (right - left) / width, (bottom - top) / height)


def tag_photo(path, image, faces, program="digiKam", orientation=1, xmp=None):
    """Write an upright image with its faces as a program would; xmp: another packet."""
    stored = image.transpose(STORED[orientation]) if orientation in STORED else image
    boxes = [(name, stored_box(image.size, box, orientation)) for name, box in faces]
    if program == "Picasa":
        (path.parent / ".picasa.ini").write_text(picasa(boxes, path.name), encoding="utf-8")
        xmp = xmp or b""
    elif xmp is None:
        xmp = packet(PROGRAMS[program](boxes, stored.size))
    save_stored(path, stored, orientation, xmp)
    return path


def save_stored(path, stored, orientation, xmp):
    """Write a picture as a file with this EXIF orientation and XMP packet."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"exif": exif.tobytes(), "quality": 90}
    if path.suffix == ".tif":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[ORIENTATION], tags[XMP] = orientation, xmp
        tags.tagtype[XMP] = 1
        options = {"tiffinfo": tags}
    elif path.suffix == ".png":
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", xmp.decode(errors="replace"), zip=orientation % 2 == 0)
        options = {"exif": exif, "pnginfo": texts, "compress_level": 1}
    elif xmp:
        options["xmp"] = xmp
    stored.save(path, **options)
