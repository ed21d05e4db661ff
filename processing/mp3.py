"""
How long an MP3 is. Its header need not tell, and of files that were joined it tells the first one's length: libsndfile
then guesses by the first frame, or stops there. The frames, each of which tells its own size, know better.
"""

import re


KBIT = {  # per second, of layer III, by MPEG-1 or its versions for lower rates
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
RATES = (44100, 48000, 32000)  # Hz, of MPEG-1
SHARE = {3: 1, 2: 2, 0: 4}  # of them the rates of MPEG-1, 2 and 2.5, by the header's bits
FEW = 5  # frames, about what an encoder's delay and padding are
# A tag, whose picture may look like frames, or a frame of layer III; what lies between costs no loop of Python.
RATED = bytes(byte for byte in range(256) if byte >> 4 not in (0, 15) and byte >> 2 & 3 != 3)
PART = re.compile(
    b"ID3[\x02-\x04]..[\x00-\x7f]{4}|\xff[\xe2\xe3\xf2\xf3\xfa\xfb][" + re.escape(RATED) + b"].", re.DOTALL
)


def read_frame(header) -> tuple[int, int]:
    """Bytes and samples of the frame of layer III with this header."""
    version, kbit, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    samples = 1152 if version == 3 else 576
    size = samples * KBIT[version == 3][kbit - 1] * 1000 // 8 // (RATES[rate] // SHARE[version])
    return size + (header[2] >> 1 & 1), samples


def find_frames(data) -> tuple[int, int, int]:
    """Where the first frame begins, how many there are, and how many samples one holds; zeros where there are none."""
    first, number, length, at = 0, 0, 0, 0
    while (part := PART.search(data, at)) is not None:
        at, found = part.start(), part[0]
        if found.startswith(b"ID3"):
            at += 10 + sum(byte << shift for byte, shift in zip(found[6:], (21, 14, 7, 0)))
            continue
        size, samples = read_frame(found)
        if not number:
            first, length = at, samples
        number += 1
        at += size
    return first, number, length


def with_length(data, told: int) -> bytes | None:
    """
    An MP3 whose header tells its length, so that libsndfile reads all of it: a frame without sound, in which decoders
    look for that, is put before the others. None where `told`, the samples that libsndfile knows of, are right, and
    where the header tells of more than there is: the file's end is lost.
    """
    first, number, length = find_frames(data)
    held = number * length
    has_header = any(name in data[first : first + 64] for name in (b"Xing", b"Info", b"VBRI"))
    if not number or has_header and told > held or 0 <= held - told <= max(FEW * length, told // 100):
        return None
    header = bytearray(data[first : first + 4])
    header[1] |= 1  # no checksum
    header[2] = 14 << 4 | header[2] & 0b1100  # the widest frame: the others' may be narrower than what is to be told
    size, _ = read_frame(header)
    is_mono, is_first_version = header[3] >> 6 == 3, length == 1152
    gap = {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[is_first_version, is_mono]
    told_so = b"Xing" + (1).to_bytes(4, "big") + number.to_bytes(4, "big")
    return (bytes(header) + bytes(gap) + told_so).ljust(size, b"\0") + data[first:]
