"""A front end in a process of its own: see front_ends.py."""

from __future__ import annotations

import socket

import msgspec
import uvloop

from headway.executor.child import Parent
from headway.llm import AsyncLLM
from headway.llm.replicas import Seat
from headway.server.metrics import Board
from headway.server.options import ServeOptions
from headway.server.serve import Wishes, serve
from headway.server.state import State


class FrontEndTicket(msgspec.Struct, frozen=True):
    """seat, and the descriptor link: what reaches the engines. listener, board: descriptors too."""

    number: int
    options: ServeOptions
    seat: Seat
    link: int
    listener: int
    board: int


async def _serve(parent: Parent, ticket: FrontEndTicket) -> None:
    wishes = Wishes()
    parent.watch(f"headway-api{ticket.number}", lambda data: [wishes.add() for _ in data].clear())
    llm = AsyncLLM.over(*ticket.seat.join(socket.socket(fileno=ticket.link)))
    config = ticket.seat.found.config
    board = Board(ticket.options.api_server_count, config.parallel.data_parallel_size, ticket.board)
    names = [config.model.served_model_name]
    state = State(llm, ticket.options, names, board, ticket.number, looks=False)
    await serve(state, socket.socket(fileno=ticket.listener), wishes, lambda: parent.send(b"."))


def main() -> None:
    parent = Parent()
    uvloop.run(_serve(parent, msgspec.msgpack.decode(parent.ticket, type=FrontEndTicket)))
    parent.leave(0)


if __name__ == "__main__":
    main()
