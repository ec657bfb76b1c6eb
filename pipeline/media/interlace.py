"""Interlaced frames to progressive ones, by FFmpeg's bwdif."""

from av.filter import Graph
from av.video.frame import VideoFrame


def deinterlaced(
    before: VideoFrame | None, frame: VideoFrame, after: VideoFrame | None
) -> VideoFrame:
    """The first field of an interlaced frame in full height; its neighbours fill in the rest.

    bwdif interpolates over time where nothing moves, along edges where something does. Which
    field is first comes from the frame's own flags. Without a neighbour, or with one of another
    size, the frame stands in for it. Raises av.error.FFmpegError.
    """
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    # send_frame: one picture for each frame, not for each field. deint=all: the caller knows.
    weave = graph.add("bwdif", "mode=send_frame:parity=auto:deint=all")
    graph.link_nodes(source, weave, graph.add("buffersink")).configure()
    pushed = [f for f in (before, frame, after) if f is not None and _alike(f, frame)]
    for each in pushed:
        graph.vpush(each)
    graph.vpush(None)
    pictures = [graph.vpull() for _ in pushed]
    return pictures[next(i for i, f in enumerate(pushed) if f is frame)]


def _alike(a: VideoFrame, b: VideoFrame) -> bool:
    return (a.width, a.height, a.format.name) == (b.width, b.height, b.format.name)
