"""Draws small Apple Photos libraries of all three generations.

    make_library("Test.photoslibrary", 10, [(image, [("Ann", (x, y, side)), (None, (x, y, side))])])

A generation is a version of Photos: 1; 2 (to 4); 5, 6 (to 8), 9, 10 (to 11): the last four differ
in the names of columns. For odd libraries, use the classes: rows are written as given, with any
column that stands in the class's schemas. All rows lie in the databases' -wal only, as in a library
that Photos has open.
"""

import io
import shutil
import sqlite3
import tempfile
from pathlib import Path
from types import MappingProxyType

from PIL import Image

WAYS = Image.Transpose
# How an upright picture is stored, by EXIF orientation: viewers turn it back.
STORED = {2: WAYS.FLIP_LEFT_RIGHT, 3: WAYS.ROTATE_180, 4: WAYS.FLIP_TOP_BOTTOM, 5: WAYS.TRANSPOSE}
STORED |= {6: WAYS.ROTATE_90, 7: WAYS.TRANSVERSE, 8: WAYS.ROTATE_270}


def make_library(path, generation, photos):
    """Make a library at `path` and return its path.

    photos: [(upright PIL image, [(name or None, (x, y, side))])]: a face's centre and side.
    """
    library = LIBRARIES[generation](path)
    persons = {None: None}
    for number, (image, faces) in enumerate(photos):
        photo = library.photo(data=jpeg(image, 1 + 5 * number % 8))  # turned in eight ways
        for name, box in faces:
            if name not in persons:
                persons[name] = library.person(name)
            library.face(photo, persons[name], image.size, box)
    return library.finish()


def jpeg(image, orientation=1):
    """Return an upright image as the bytes of a JPEG file with this EXIF orientation."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    stored = image.transpose(STORED[orientation]) if orientation in STORED else image
    stored.save(file, "JPEG", quality=95, subsampling=0, exif=exif)
    return file.getvalue()


def fractions(size, box):
    """Return Photos' numbers for a box: x, y from below, and side by the image's longer side."""
    return box[0] / size[0], 1 - box[1] / size[1], box[2] / max(size)


class Library:
    """A folder with databases that are filled through `insert` and put in place by `finish`."""

    schemas = MappingProxyType({})  # {file in database/: {table: columns}}

    def __init__(self, path):
        self.path = Path(path)
        self.made = tempfile.TemporaryDirectory()
        self.open = {}
        for file, tables in self.schemas.items():
            db = self.open[file] = sqlite3.connect(Path(self.made.name, file), isolation_level=None)
            db.execute("PRAGMA journal_mode = wal")
            db.execute("PRAGMA wal_autocheckpoint = 0")
            for table, columns in tables.items():
                key, comma, others = columns.partition(",")
                db.execute(f"CREATE TABLE {table} ({key} INTEGER PRIMARY KEY{comma}{others})")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def execute(self, table, query, *values):
        """Run a query about a table in the database that holds it."""
        file = next(file for file, tables in self.schemas.items() if table in tables)
        return self.open[file].execute(query, values)

    def insert(self, table, **columns):
        marks = ", ".join("?" * len(columns))
        query = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"
        return self.execute(table, query, *columns.values()).lastrowid

    def update(self, table, key, **columns):
        changes = ", ".join(f"{column} = ?" for column in columns)
        query = f"UPDATE {table} SET {changes} WHERE rowid = ?"
        self.execute(table, query, *columns.values(), key)

    def write(self, place, data):
        file = self.path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def finish(self):
        """Copy the databases, all rows still in their -wal, into the library. Returns its path."""
        (self.path / "database").mkdir(parents=True, exist_ok=True)
        for file in self.open:
            for name in (file, file + "-wal"):
                if Path(self.made.name, name).exists():
                    shutil.copyfile(Path(self.made.name, name), self.path / "database" / name)
        for db in self.open.values():
            db.close()
        self.made.cleanup()
        return self.path


class Photos10(Library):
    """Photos 10 and 11. `photo` returns the key of the asset, whose uuid `uuid(key)` is."""

    assets, edited = "ZASSET", "ZADJUSTMENTSSTATE"
    to_photo, to_person = "ZASSETFORFACE", "ZPERSONFORFACE"

    def __init__(self, path):
        face = "Z_PK, ZUUID, ZCENTERX, ZCENTERY, ZSIZE, ZSOURCEWIDTH, ZSOURCEHEIGHT, ZHIDDEN"
        face += f", ZISINTRASH, ZTRAININGTYPE, ZMANUAL, {self.to_photo}, {self.to_person}"
        if self.assets == "ZASSET":
            face += ", ZDETECTIONTYPE"
        if self.to_photo == "ZASSETFORFACE":
            face += ", ZASSETFORTORSO, ZPERSONFORTORSO"
        asset = "Z_PK, ZUUID, ZDIRECTORY, ZFILENAME, ZKIND, ZSAVEDASSETTYPE, ZWIDTH, ZHEIGHT"
        asset += ", ZTRASHEDSTATE, ZHIDDEN, ZVISIBILITYSTATE, ZAVALANCHEPICKTYPE"
        tables = {"ZDETECTEDFACE": face, self.assets: f"{asset}, {self.edited}"}
        person = "Z_PK, ZFULLNAME, ZDISPLAYNAME, ZMERGETARGETPERSON, ZVERIFIEDTYPE, ZTYPE"
        crop = "Z_PK, ZASSET, ZFACE, ZPERSON, ZUUID, ZRESOURCEDATA"
        tables |= {"ZPERSON": person, "ZFACECROP": crop}
        self.schemas = {"Photos.sqlite": tables, "photos.db": {"LiGlobals": "modelId, value"}}
        super().__init__(path)

    def uuid(self, key):
        return f"{key % 16:X}{key:07}-0000-4000-8000-000000000000"

    def person(self, name, **columns):
        row = {"ZFULLNAME": name, "ZDISPLAYNAME": name, "ZVERIFIEDTYPE": 1}
        return self.insert("ZPERSON", **row | columns)

    def photo(self, image=None, data=None, ending="jpeg", **columns):
        """Add an asset; its original is `data`, else `image` as JPEG, else absent."""
        row = {"ZKIND": 0, "ZSAVEDASSETTYPE": 3, "ZTRASHEDSTATE": 0, "ZHIDDEN": 0, self.edited: 0}
        key = self.insert(self.assets, **row)
        uuid = self.uuid(key)
        names = {"ZUUID": uuid, "ZDIRECTORY": uuid[0], "ZFILENAME": f"{uuid}.{ending}"}
        self.update(self.assets, key, **names | columns)
        if data or image:
            self.write(f"originals/{uuid[0]}/{uuid}.{ending}", data or jpeg(image))
        return key

    def edit(self, photo, image=None, end="_1_201_a.jpeg"):
        """Mark a photo as edited, and write the edited picture unless it is not there."""
        self.update(self.assets, photo, **{self.edited: 1})
        if image:
            uuid = self.uuid(photo)
            self.write(f"resources/renders/{uuid[0]}/{uuid}{end}", jpeg(image))

    def smaller_copy(self, photo, image, place="resources/derivatives/{}_1_105_c.jpeg"):
        self.write(place.format(f"{self.uuid(photo)[0]}/{self.uuid(photo)}"), jpeg(image))

    def face(self, photo, person, size, box, /, **columns):
        x, y, side = fractions(size, box)
        row = {"ZCENTERX": x, "ZCENTERY": y, "ZSIZE": side, "ZSOURCEWIDTH": size[0]}
        row |= {"ZSOURCEHEIGHT": size[1], "ZHIDDEN": 0, "ZISINTRASH": 0, "ZTRAININGTYPE": 0}
        row |= {self.to_photo: photo, self.to_person: person}
        key = self.insert("ZDETECTEDFACE", **row)
        uuid = {"ZUUID": f"{key:08X}-FACE-4000-8000-000000000000"}
        self.update("ZDETECTEDFACE", key, **uuid | columns)
        return key


class Photos9(Photos10):
    edited = "ZHASADJUSTMENTS"


class Photos6(Photos9):
    to_photo, to_person = "ZASSET", "ZPERSON"


class Photos5(Photos6):
    assets = "ZGENERICASSET"


class Photos2(Library):
    """Photos 2 to 4. Faces have tiles; uuids differ by case only."""

    link = "imageModelId"
    unedited = MappingProxyType({"hasAdjustments": 0})
    face_columns = "modelId, uuid, isInTrash, personId, imageModelId, sourceWidth, sourceHeight, "
    face_columns += "centerX, centerY, size, hidden, manual, adjustmentUuid, trainingType"
    version = "modelId, uuid, masterUuid, adjustmentUuid, hasAdjustments, isInTrash, isHidden, type"
    version += ", nonRawMasterUuid, burstPickType, showInLibrary"
    master = "modelId, uuid, imagePath, fileIsReference, volumeId, isMissing"
    person_columns = "modelId, name, displayName, verifiedType, mergeTargetPersonId, personType"
    resource = "modelId, attachedModelId, attachedModelType, resourceType, resourceTag, UTI"
    schemas = {  # noqa: RUF012
        "photos.db": {
            "LiGlobals": "modelId, keyPath, value",
            "RKFace": face_columns,
            "RKPerson": person_columns,
            "RKVersion": version,
            "RKMaster": master,
            "RKModelResource": resource,
        }
    }

    def uuid(self, number):
        """Return a uuid: those of 2 and 3, of 4 and 5, and so on differ by case only."""
        return f"{'aA'[number % 2]}bcdEFG%+{number // 2:013}"

    def person(self, name, **columns):
        return self.insert("RKPerson", **{"name": name, "displayName": name} | columns)

    def photo(self, image=None, data=None, place=None, is_reference=0, **columns):
        """Add a version of a photo and its master, at `place` in Masters. Returns its key."""
        row = {"adjustmentUuid": "UNADJUSTEDNONRAW", "isInTrash": 0, "isHidden": 0, "type": 2}
        key = self.insert("RKVersion", **row | self.unedited | columns)
        self.update("RKVersion", key, uuid=self.uuid(key), masterUuid=f"m{key}")
        place = place or f"2019/07/{key:04}.jpg"
        self.insert("RKMaster", uuid=f"m{key}", imagePath=place, fileIsReference=is_reference)
        if data or image:
            self.write(f"Masters/{place}", data or jpeg(image))
        return key

    def edit(self, photo, image=None, folder="00/00"):
        """Mark a photo as edited, and write the edited picture to this folder."""
        tag = f"edit{photo}"
        self.update("RKVersion", photo, hasAdjustments=1, adjustmentUuid=tag)
        row = {"attachedModelId": photo, "attachedModelType": 2, "resourceType": 4}
        key = self.insert("RKModelResource", **row, resourceTag=tag)
        if image:
            self.write(f"resources/media/version/{folder}/fullsizeoutput_{key:x}.jpeg", jpeg(image))

    def preview(self, photo, image, kind, tag="UNADJUSTEDNONRAW"):
        """Write a smaller copy of a photo: kind is largepv, thumb or mini."""
        place = f"00/00/{photo:x}/{tag}_{kind}_{photo:x}.jpg"
        self.write(f"resources/proxies/derivatives/{place}", jpeg(image))

    def face(self, photo, person, size, box, /, **columns):
        x, y, side = fractions(size, box)
        row = {"isInTrash": 0, "hidden": 0, "personId": person, "sourceWidth": size[0]}
        row |= {"sourceHeight": size[1], "centerX": x, "centerY": y, "size": side}
        key = self.insert("RKFace", **row | {self.link: self.link_value(photo)} | columns)
        self.update("RKFace", key, uuid=self.uuid(key))
        return key

    def link_value(self, photo):
        return photo

    def tile(self, face, image, number=None):
        """Add Photos' own picture of a face, as the resource of this number."""
        row = {"attachedModelId": face, "attachedModelType": 5, "resourceType": 6}
        key = self.insert("RKModelResource", **row | ({"modelId": number} if number else {}))
        digits = f"{key:04x}"
        place = f"{digits[-4:-2]}/{digits[:-4] or '0':0>2}"
        self.write(f"resources/media/face/{place}/facetile_{key:x}.jpeg", jpeg(image))


class Photos1(Photos2):
    """Photos 1: three databases. `typed`: resources have the column attachedModelType."""

    link = "imageId"
    unedited = MappingProxyType({})  # it has no such column
    typed = True
    resource = "modelId, attachedModelId, attachedModelType, resourceType, resourceTag, "
    resource += "resourceUuid, filename, UTI"
    version = "modelId, uuid, masterUuid, adjustmentUuid, isInTrash, isHidden, type"

    def __init__(self, path):
        resource = self.resource if self.typed else self.resource.replace("attachedModelType, ", "")
        face = self.face_columns.replace("imageModelId", "imageId").replace(", trainingType", "")
        person = "modelId, name, searchName, representativeFaceId, personType"
        self.schemas = {
            "Person.db": {"RKFace": face, "RKPerson": person},
            "ImageProxies.apdb": {"RKModelResource": resource},
            "Library.apdb": {"RKVersion": self.version, "RKMaster": self.master},
        }
        super().__init__(path)

    def person(self, name, **columns):
        return self.insert("RKPerson", name=name, **columns)

    def face(self, photo, person, size, box, /, **columns):
        return super().face(photo, person or 0, size, box, **columns)

    def link_value(self, photo):
        return self.uuid(photo)

    def resource_of(self, key, of_type, image, filename, **columns):
        """Add a picture that hangs on the face (type 5) or the version (type 2) of this key."""
        row = {"attachedModelId": key, "filename": filename, "resourceType": 6} | columns
        if self.typed:
            row["attachedModelType"] = of_type
        number = self.insert("RKModelResource", **row)
        uuid = f"é+{number}"
        self.update("RKModelResource", number, resourceUuid=uuid)
        folder = f"resources/modelresources/{ord(uuid[0])}/{ord(uuid[1])}/{uuid}"
        self.write(f"{folder}/{filename}", jpeg(image))

    def tile(self, face, image, filename="facetile.jpg"):
        self.resource_of(face, 5, image, filename)

    def edit(self, photo, image=None):
        tag = f"edit{photo}"
        self.update("RKVersion", photo, adjustmentUuid=tag)
        if image:
            self.resource_of(photo, 2, image, "fullsize.jpg", resourceType=4, resourceTag=tag)


class Photos1Untyped(Photos1):
    typed = False


LIBRARIES = {1: Photos1, 2: Photos2, 5: Photos5, 6: Photos6, 9: Photos9, 10: Photos10}
LIBRARIES["1 untyped"] = Photos1Untyped
