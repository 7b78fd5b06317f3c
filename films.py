"""Reading films and streams as players show them, and writing films, with PyAV (webcam.py).

Times are in seconds from the first frame. PyAV is imported where it is needed: on macOS it and
OpenCV complain about each other.
"""

import contextlib
import fractions
import functools
import itertools
import operator
import os
import re

import numpy as np
from PIL import Image, ImageOps

import imaging
import utils

CODECS = {".mp4": ("libx264", "yuv420p"), ".avi": ("mjpeg", "yuvj420p")}  # and pixel formats
STREAM_TIMEOUTS = (10.0, 5.0)  # seconds to open a stream and to read from it
MAX_FRAME_GAP = 60.0  # seconds that a frame is shown or written; what is longer is a broken clock
SLOWEST, FASTEST, USUAL = 0.05, 500.0, 25.0  # frames a second; of other rates the usual one is used
NO_FILMS = re.compile("tty|x?bin|adf|idf|image2|.*_pipe")  # formats of texts and single pictures
PQ, HLG = 16, 18  # FFmpeg's numbers of the transfer functions of HDR (ITU-R BT.2100)


class Film:
    """An open film or stream. Raises PictureError."""

    def __init__(self, address, name, live=False):
        import av

        self.name = name  # as messages have it
        try:
            self.container = av.open(
                address,
                format=None if live else film_format(address),
                options={"rtsp_transport": "tcp"},
                timeout=STREAM_TIMEOUTS if live else None,
                metadata_errors="ignore",
            )
        except av.error.FFmpegError:
            raise imaging.PictureError("no frame can be read") from None
        self.format = self.container.format.name
        self.stream = stream = self.container.streams.best("video")
        is_film = stream and stream.codec_context and (live or not NO_FILMS.fullmatch(self.format))
        if not is_film or stream.disposition & av.stream.Disposition.attached_pic:  # a song's cover
            raise imaging.PictureError("there is no film in it, or none of a known codec")
        stream.thread_type = "SLICE" if live else "AUTO"  # by frames: faster, but later
        rate = float(stream.average_rate or 0)
        self.rate = rate if SLOWEST <= rate <= FASTEST else USUAL
        self.duration = (self.container.duration or 0) / av.time_base  # seconds; 0: not known
        if self.format == "avi":  # FFmpeg shortens what was cut
            self.duration = max(self.duration, stream.frames / self.rate)

    def is_finite(self):
        """Say whether a stream ends by itself: it is a film that somebody serves."""
        is_playlist = self.format in ("hls", "dash")  # its size says nothing
        return self.duration > 0 or (self.container.size > 0 and not is_playlist)

    def frames(self):
        """Yield (timestamp, image) as a player shows them: deinterlaced, upright, square pixels.

        image: uint8 RGB (height, width, 3).
        """
        timestamp = None
        for frame in deinterlace(self.decode()):
            if timestamp is None:
                origin, timestamp = frame.time or 0.0, 0.0
            elif frame.time is None or frame.time - origin <= timestamp:  # as in raw streams
                timestamp += 1 / self.rate
            else:
                timestamp = frame.time - origin
            yield timestamp, self.to_image(frame)
        if timestamp is None:
            raise imaging.PictureError("no frame can be read")

    def decode(self):
        """Yield the decoded frames as they are; warn if bytes are missing at the end."""
        import av

        start = (self.container.start_time or 0) / av.time_base
        end = 0.0
        with contextlib.suppress(av.error.FFmpegError):  # a cut file, or a stream that is lost
            for packet in self.container.demux():
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream is self.stream:
                    with contextlib.suppress(av.error.FFmpegError):  # damaged, or empty
                        yield from packet.decode()
        counted = re.search("mp4|matroska|avi", self.format)  # others estimate
        if counted and 0 < end - start < min(0.9 * self.duration, self.duration - 0.5):
            seconds = f"{end - start:.1f} of {self.duration:.1f} s"
            utils.warn(f"{self.name}: broke off after {seconds}: its end may be missing")

    def to_image(self, frame):
        """Return a decoded frame as uint8 RGB (height, width, 3)."""
        ratio = float(self.stream.sample_aspect_ratio or 1)  # width of its pixels, in heights
        width = round(frame.width * ratio) if 0.1 < ratio < 10 else frame.width
        has_alpha = any(part.is_alpha for part in frame.format.components)
        image = frame.to_ndarray(format="rgba" if has_alpha else "rgb24", width=width)
        if has_alpha:
            if not image[..., 3].any():  # some files leave it empty
                image[..., 3] = 255
            image = np.asarray(imaging.rgb(Image.fromarray(image)))
        if frame.color_trc in (PQ, HLG):
            image = hdr_table(frame.color_trc)[image]
        matrix = frame.side_data.get("DISPLAYMATRIX")
        return apply_display_matrix(image, np.frombuffer(matrix, "int32")) if matrix else image


def film_format(path):
    """Return FFmpeg's name of a format that it would take for pictures by the file's name, or None.

    These are raw MJPEG and animated PNG. Raises PictureError for what cannot be read.
    """
    try:
        if not os.path.isfile(path):  # a named pipe would wait for ever
            raise imaging.PictureError("not a file that can be read")
        with open(path, "rb") as file:
            start = file.read(len(imaging.PNG_SIGNATURE))
    except OSError as error:
        raise imaging.PictureError(error.strerror) from None
    if start == imaging.PNG_SIGNATURE:
        return "apng"
    return "mjpeg" if start[:2] == b"\xff\xd8" else None


@functools.cache
def hdr_table(transfer):
    """Return the 8-bit SDR value of each 8-bit HDR value, uint8 (256,). transfer: PQ or HLG.

    HDR's white of 203 cd/m² becomes SDR's, with gamma 2.2; what is brighter is cut off.
    """
    signal = np.arange(256) / 255
    if transfer == PQ:
        root = signal ** (1 / 78.84375)
        ratio = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
        light = 10_000 * ratio ** (1 / 0.1593017578125)
    else:
        bright = np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892
        light = 1000 * (np.where(signal > 0.5, bright, 4 * signal**2) / 12) ** 1.2
    return np.rint(255 * np.minimum(light / 203, 1) ** (1 / 2.2)).astype("uint8")


def apply_display_matrix(image, matrix):
    """Turn and mirror an image as a film's display matrix says, nine numbers in three rows."""
    across, turned_up, _, turned_across, up = matrix[:5]
    if abs(turned_up) > abs(across):
        image, across, up = image.transpose(1, 0, 2), turned_across, turned_up
    return np.ascontiguousarray(image[:: -1 if up < 0 else 1, :: -1 if across < 0 else 1])


def deinterlace(frames):
    """Yield decoded frames, from the first interlaced one on through FFmpeg's deinterlacer."""
    import av.filter

    kind = operator.attrgetter("width", "height", "format.name")
    for _, alike in itertools.groupby(frames, kind):
        graph = None
        for frame in alike:
            if not graph and frame.interlaced_frame:
                graph = av.filter.Graph()
                bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
                parts = graph.add_buffer(frame), bwdif, graph.add("buffersink")
                graph.link_nodes(*parts).configure()
            yield from filter_frame(graph, frame) if graph else (frame,)
        if graph:
            yield from filter_frame(graph, None)


def filter_frame(graph, frame):
    """Push a frame into a filter graph, None at the end; yield those that come out."""
    graph.push(frame)
    with contextlib.suppress(BlockingIOError, EOFError):
        while True:
            yield graph.pull()


def write_film(path, rate):
    """Coroutine: takes pairs (PIL image, timestamp), and writes a film that keeps these times.

    All pictures get the size of the first. The film appears whole when the coroutine is closed, and
    also after Ctrl-C. Raises UserError. rate: frames a second; the times of an .avi are multiples
    of its inverse.
    """
    import av

    image, timestamp = yield
    clock = previous = 0.0  # what is shown for long is cut short
    last = -1
    try:
        with utils.atomic_write(path) as part, av.open(str(part.resolve()), "w") as film:
            stream = add_stream(film, path.suffix.lower(), rate, image.size)
            try:
                while True:
                    clock += min(timestamp - previous, MAX_FRAME_GAP)
                    previous = timestamp
                    tick = round(clock / stream.codec_context.time_base)
                    if tick > last:  # else it comes too early for an .avi
                        image = ImageOps.pad(image, (stream.width, stream.height))
                        frame = av.VideoFrame.from_image(image)
                        frame.pts = last = tick
                        film.mux(stream.encode(frame))
                    image, timestamp = yield
            except (GeneratorExit, KeyboardInterrupt) as error:
                end = error
            film.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        problem = f"could not be written ({utils.first_line(error)}): free some space"
        raise utils.UserError(f"--output {utils.escape(path)}: {problem}") from None
    raise end


def add_stream(film, ending, rate, size):
    """Add a stream for pictures of a size (width, height) to a PyAV film. Returns it."""
    codec, pixels = CODECS[ending]
    width, height = (max(2, side - side % 2) for side in size)
    rate = fractions.Fraction(rate).limit_denominator(1001)
    return film.add_stream(
        codec,
        rate=rate,
        options={"preset": "veryfast", "crf": "20", "bf": "0"},
        pix_fmt=pixels,
        width=width,
        height=height,
        time_base=1 / fractions.Fraction(rate if ending == ".avi" else 90_000),
    )
