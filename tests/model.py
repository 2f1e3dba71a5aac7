"""A checker for the sleep and wake protocol: every interleaving, on two kinds of memory, with deaths.

A program is text, a step a line, with the labels of the diagram in `_words.py` in front:

    x = [word]            load               order, fence       barriers: the first one is left out on "tso"
    [word] = x            store              membarrier         a barrier here and in every other process
    x = y                 no access          ring [bell]        add 1 and wake who waits, in one call
    if x: name            jump to ``name:``  wait [bell] x      sleep if the bell is x
    goto name, end                           wake [word]        wake who waits, and no more
    set [event]           let one through who waits, else the next one who will
    x = take [a] [b]      wait for one of these events and reset it, in one call: the first one if both are set;
                          x says which, 1 or 2, or 0 after an early return. ``reset [event]`` does no more than that
    fill [fifo]           make it readable, and let all through who wait; ``wait [fifo] 0`` waits until it is, and
                          ``wait [a] [b] 0`` until one of them is
    x = reset [fifo]      make it unreadable; x says whether it was readable
    claim role            wait until nobody alive has it, and take it; ``release role``; ``x = held role``: by who lives
    x = try role          take it if nobody alive has it; x says whether
    lock m, unlock m      a monitor that two threads of one handle share
    note x = y            say something to the checker, or to the handle's other thread within a monitor
    share x = y           say something to the handle's other thread outside of any, and
    x = shared y          look at what it has said. The interpreter keeps these in order
    check x               what must be true of a message
    try: ... except:      from each step in between an exception may lead to ``except:``

Memory. Each process has a window of accesses that it has issued and that have not been performed:

- "tso", x86: stores wait in the window and are performed in their order; a load is performed when it
  is issued, from the youngest store to its word in the window, else from memory.
- "free": loads wait as well, and everything is performed in any order, except accesses to one word.
  What depends on a load goes on with a guess; if the load finds something else in the end, the run
  never was. This is more than arm64 may do (there a store waits for the branches before it), so what
  is right here is right there. A performed store is seen by everybody at once (multi-copy atomic).

`order`, `fence` and each call of the kernel wait until the window is empty. `membarrier` waits until
every other window was empty once since it began, whatever that process is in the middle of. The window of one
that was killed or stopped is still performed: a switch to the kernel drains it.

Events, each a limited number of times in a run and at any step: a process is killed or stopped (the
two differ in whether its role can be claimed; where nobody claims it, in nothing), a sleeper returns
early (a signal, its time-out), an exception. A stale waker is one that is not scheduled for a while.

With `looks` who sleeps looks again after a while, but in a run in which somebody was killed, and when nothing else
happens any more: all that sleep return, so many times in a run.

Lost is a state in which nothing can happen any more but such events, with

- a message unread in a lane while a reader sleeps; or
- room in a lane for what its writer waits for while that writer sleeps,

unless the other side was killed or stopped in between, before its `write` or `read` had returned, and
nobody has taken its role since: then nobody was promised anything yet, and C1 is still to come. With `looks` there
is no such exception. A message that is not the one that belongs at its position is a loss as well ("torn").
"""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

RUNNING, ASLEEP, HALTED, ENDED = range(4)
EVENTS = "halts", "early", "raises", "looks"
LABEL = re.compile(r"([WRSJDTX]\d|C1|\w*<\w+) +(.*)")
FORMS = {
    "load": r"(?P<reg>\w+) = \[(?P<cell>\w+)(?: \+ (?P<index>.+))?\]",
    "store": r"\[(?P<cell>\w+)(?: \+ (?P<index>.+?))?\] = (?P<value>.+)",
    "note": r"note (?P<cell>\w+) = (?P<value>.+)",
    "if": r"if (?P<value>.+): (?P<target>\w+)",
    "goto": r"goto (?P<target>\w+)",
    "ring": r"ring \[(?P<cell>\w+)\]",
    "wake": r"wake \[(?P<cell>\w+)\]",
    "wait": r"wait \[(?P<cell>\w+)\](?: \[(?P<second>\w+)\])? (?P<value>.+)",
    "claim": r"claim (?P<cell>\w+)",
    "try": r"(?P<reg>\w+) = try (?P<cell>\w+)",
    "held": r"(?P<reg>\w+) = held (?P<cell>\w+)",
    "check": r"check (?P<value>.+)",
    "lock": r"lock (?P<cell>\w+)",
    "unlock": r"unlock (?P<cell>\w+)",
    "fence": "fence|order",
    "membarrier": "membarrier",
    "end": "end",
    "signal": r"set \[(?P<cell>\w+)\]",
    "reset": r"(?:(?P<reg>\w+) = )?reset \[(?P<cell>\w+)\]",
    "fill": r"fill \[(?P<cell>\w+)(?: \+ (?P<index>.+))?\]",
    "take": r"(?:(?P<reg>\w+) = )?take \[(?P<cell>\w+)\](?: \[(?P<second>\w+)\])?",
    "release": r"release (?P<cell>\w+)",
    "share": r"share (?P<cell>\w+) = (?P<value>.+)",
    "look": r"(?P<reg>\w+) = shared (?P<value>.+)",
    "set": r"(?P<reg>\w+) = (?P<value>.+)",
}
LOCAL = {"note", "if", "goto", "check", "set"}  # nobody else can tell when these happen, so they take no time
# These wait for an empty window.
DRAINED = {
    "ring", "wake", "fill", "wait", "signal", "reset", "take", "claim", "try", "held", "release", "fence", "membarrier",
    "end",
}  # fmt: skip


class Line(NamedTuple):
    """A line of a program's text."""

    mark: str  # the name before a colon, else ""
    label: str
    text: str


def lines(program):
    """The lines of a program, without comments."""
    for line in program.splitlines():
        line = line.split("#")[0].strip()
        labelled = LABEL.fullmatch(line)
        if line.endswith(":"):
            yield Line(line[:-1], "", "")
        elif line:
            yield Line("", *labelled.groups()) if labelled else Line("", "", line)


class Step(NamedTuple):
    """A line made ready to run."""

    kind: str
    text: str
    reg: int = -1
    cell: int = -1
    cells: tuple = ()  # that may end a wait
    index: object = None
    value: object = None
    target: int = -1


class Program:
    """The steps of one process, its registers, and which of these matter at each step."""

    def __init__(self, text, cells, memory):
        self.names = {}  # of the registers
        self.steps = []
        marks, parsed, inside, tries = {}, [], False, set()
        for mark, label, text in lines(text):  # noqa: B020 - the text is not needed any more
            if mark:
                inside = mark == "try" or inside and mark != "except"
                marks[mark] = len(parsed)
            elif not (text == "order" and memory == "tso"):
                kind, match = next((k, m) for k, m in ((k, re.fullmatch(f, text)) for k, f in FORMS.items()) if m)
                if inside:
                    tries.add(len(parsed))
                parsed.append((kind, f"{label:3} {text}", match.groupdict()))
        parsed.append(("end", "end", {}))
        uses = []
        for kind, text, part in parsed:
            used = set()
            index, value = (self._expression(part.get(what), cells, used) for what in ("index", "value"))
            assert part.get("reg") not in cells, f"{text}: a register cannot have the name of a cell"
            reg = self.names.setdefault(part["reg"], len(self.names)) if part.get("reg") else -1
            target = marks[part["target"]] if "target" in part else -1
            events = tuple(cells[part[name]] for name in ("cell", "second") if part.get(name))
            self.steps.append(Step(kind, text, reg, cells.get(part.get("cell"), -1), events, index, value, target))
            uses.append(used | {"wanted"} if kind in ("wait", "take") and "wanted" in self.names else used)
        self.handler = {pc: marks["except"] for pc in tries}
        self._find_live(uses)

    def _expression(self, text, cells, used):
        """``f(registers, memory)`` for an expression over the names of registers and of noted cells."""
        if text is None:
            return None
        tree = ast.parse(text, mode="eval")
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        for node in names:
            if node.id not in cells:
                used.add(node.id)
                self.names.setdefault(node.id, len(self.names))
        where = {n.id: f"m[{cells[n.id]}]" if n.id in cells else f"r[{self.names[n.id]}]" for n in names}
        return eval("lambda r, m: " + re.sub(r"\b[a-z_]\w*", lambda m: where.get(m[0], m[0]), text))

    def _find_live(self, uses):
        """What a register holds that will never be used must not make two states out of one."""
        names = {number: name for name, number in self.names.items()}
        live = [set() for _ in self.steps]
        before = None
        while before != live:
            before = [set(names) for names in live]
            for pc in range(len(self.steps) - 1, -1, -1):
                step = self.steps[pc]
                follow = {pc + 1} if step.kind not in ("goto", "end") else set()
                follow |= {step.target, self.handler.get(pc, -1)} - {-1}
                out = set().union(*(live[other] for other in follow))
                live[pc] = out - {names.get(step.reg)} | uses[pc]
                if pc in self.handler:
                    live[pc] |= live[self.handler[pc]]
        self.dead = [[i for i, name in names.items() if name not in known] for known in live]


class Result(NamedTuple):
    """What `Model.explore` found."""

    states: int
    loss: str  # "" if there is none
    trace: list


class Model:
    """Some processes on one memory.

    Args:
        programs: A name for each process, and its program. "reader..." reads, "writerN..." writes in lane N. Of a ring
            that broadcasts the reader "... x" has the cells joined_x, read_posN_x and freedN_x, and the role reader_x.
        memory: "tso" or "free".
        start: What cells hold at first, if not 0; a list makes so many cells one after another.
        events: How often each of EVENTS may happen in one run.
        mortal: The processes that may be halted; None is all.
    """

    def __init__(self, programs, memory, start=None, mortal=None, **events):
        self._tso = Model(programs, "tso", start, mortal, **events) if memory == "free" else None
        self.names = list(programs)
        self.memory = memory
        self.mortal = self.names if mortal is None else mortal
        self.budget = tuple(events.pop(name, 0) for name in EVENTS)
        assert not events
        start = {"torn": 0, **(start or {})}
        for text in programs.values():
            for cell in re.findall(r"\[([a-z_]\w*)|\b(?:note|claim|lock|share|try) (\w+)", text):
                start.setdefault(cell[0] or cell[1], 0)
        self.cells, content, self.cell_names = {}, [], []
        for name, values in start.items():
            self.cells[name] = len(content)
            content += values if isinstance(values, list) else [values]
            self.cell_names += [name] * (len(content) - len(self.cell_names))
        self.programs = [Program(text, self.cells, memory) for text in programs.values()]
        self.start = tuple(content)
        self.values = [{value} for value in content]  # that a cell was ever seen to hold: what a load may guess
        self.guessed = [{} for _ in content]  # the states that led to such guesses, and will to more

    # ------------------------------------------------------------ one step

    def _go_on(self, i, pc, regs, mem, window=()):
        """Take the steps from `pc` on that take no time; the process, and memory with what was noted."""
        program = self.programs[i]
        regs = list(regs)
        while True:
            step = program.steps[pc]
            kind = step.kind
            if kind not in LOCAL and (kind != "fence" or window):
                break
            pc += 1
            if kind == "set":
                regs[step.reg] = step.value(regs, mem)
            elif kind == "goto" or kind == "if" and step.value(regs, mem):
                pc = step.target
            elif kind == "note":
                mem = self._put(mem, step.cell, step.value(regs, mem))
            elif kind == "check" and not step.value(regs, mem):
                mem = self._put(mem, self.cells["torn"], i + 1)
        for dead in program.dead[pc]:
            regs[dead] = 0
        return (pc, RUNNING, 0, tuple(regs), window), mem

    @staticmethod
    def _put(mem, cell, value):
        return mem if mem[cell] == value else mem[:cell] + (value,) + mem[cell + 1 :]

    def _next(self, i, state):
        """What the next step of process `i` leads to: some pairs of all processes and the memory."""
        procs, mem, _ = state
        pc, _, waiting, regs, window = procs[i]
        program = self.programs[i]
        step = program.steps[pc]
        kind = step.kind
        if kind in ("load", "store"):
            cell = step.cell + (step.index(regs, mem) if step.index else 0)
            same = [access for access in window if access[0] == cell]
        if kind == "store":
            value = step.value(regs, mem)
            after, mem2 = self._go_on(i, pc + 1, regs, mem, window + ((cell, value, False),))
            if program.steps[after[0]].kind in DRAINED and not (same or self.memory == "tso" and window):
                after, mem2 = self._go_on(i, pc + 1, regs, mem, window)  # now, or now: it cannot go on before
                mem2 = self._put(mem2, cell, value)
            yield self._with(procs, i, after), mem2
            return
        if kind == "load":
            if not same or not same[-1][2]:
                value = same[-1][1] if same else mem[cell]
                after, mem2 = self._go_on(i, pc + 1, self._with(regs, step.reg, value), mem, window)
                yield self._with(procs, i, after), mem2
            if self.memory == "free" and (not same or same[-1][2]):
                self.guessed[cell][state] = None
                for value in self.values[cell]:
                    if value != mem[cell] or same:  # a load that finds what is there now may as well be over
                        late = window + ((cell, value, True),)
                        after, mem2 = self._go_on(i, pc + 1, self._with(regs, step.reg, value), mem, late)
                        if program.steps[after[0]].kind not in DRAINED:
                            yield self._with(procs, i, after), mem2
            return
        if kind == "lock":
            # Held by n: n + 1. Free, and last held by n: -n - 1; what n did inside must have been performed.
            holder = mem[step.cell]
            if holder > 0 or holder < 0 and -holder - 1 != i and procs[-holder - 1][4]:
                return
            mem = self._put(mem, step.cell, i + 1)
        elif kind == "unlock":
            mem = self._put(mem, step.cell, -i - 1)
        elif kind == "share":
            mem = self._put(mem, step.cell, step.value(regs, mem))
        elif kind == "look":
            regs = self._with(regs, step.reg, step.value(regs, mem))
        elif window:
            return
        elif kind == "end":
            yield self._with(procs, i, (pc, ENDED, 0, regs, ())), mem
            return
        elif kind == "wait" and all(mem[cell] == step.value(regs, mem) for cell in step.cells):
            yield self._with(procs, i, (pc, ASLEEP, step.cells, regs, ())), mem
            return
        elif kind == "take":
            which = next((n for n, cell in enumerate(step.cells, 1) if mem[cell]), 0)
            if not which:
                yield self._with(procs, i, (pc, ASLEEP, step.cells, regs, ())), mem
                return
            after, mem = self._wake(i, procs[i], self._put(mem, step.cells[which - 1], 0), which)
            yield self._with(procs, i, after), mem
            return
        elif kind == "signal":
            waiting = [j for j, other in enumerate(procs) if other[1] == ASLEEP and step.cell in other[2]]
            for j in waiting:  # any one of them
                woken, mem2 = self._wake(j, procs[j], mem, 1 + procs[j][2].index(step.cell))
                after, mem2 = self._go_on(i, pc + 1, regs, mem2)
                yield self._with(self._with(procs, j, woken), i, after), mem2
            if waiting:
                return
            mem = self._put(mem, step.cell, 1)
        elif kind in ("reset", "release"):
            if step.reg >= 0:
                regs = self._with(regs, step.reg, mem[step.cell])
            mem = self._put(mem, step.cell, 0)
        elif kind == "held":
            holder = mem[step.cell]
            alive = holder and (procs[holder - 1][1] != HALTED or procs[holder - 1][4])
            regs = self._with(regs, step.reg, int(bool(alive)))
        elif kind == "try":
            holder = mem[step.cell]
            free = not holder or procs[holder - 1][1] == HALTED and not procs[holder - 1][4]
            regs = self._with(regs, step.reg, int(free))
            mem = self._put(mem, step.cell, i + 1) if free else mem
        elif kind == "claim":
            holder = mem[step.cell]
            if holder and (procs[holder - 1][1] != HALTED or procs[holder - 1][4]):
                return
            mem = self._put(mem, step.cell, i + 1)
        elif kind == "membarrier":
            # In two steps: from the first on, `waiting` has the processes whose window was never empty since.
            if waiting > 1:
                return
            if not waiting:
                others = sum(2 << j for j, other in enumerate(procs) if other[4])
                if others:
                    yield self._with(procs, i, (pc, RUNNING, 1 + others, regs, ())), mem
                    return
        elif kind in ("ring", "wake", "fill"):
            cell = step.cell + (step.index(regs, mem) if step.index else 0)
            if kind != "wake":
                mem = self._put(mem, cell, 1 if kind == "fill" else mem[cell] + 1)
            for j, other in enumerate(procs):
                if other[1] == ASLEEP and cell in other[2]:
                    woken, mem = self._wake(j, other, mem)
                    procs = self._with(procs, j, woken)
        after, mem = self._go_on(i, pc + 1, regs, mem, window)
        yield self._with(procs, i, after), mem

    def _wake(self, i, proc, mem, which=0):
        """What becomes of a process that sleeps, or is about to, and of the memory; `which` of its events woke it."""
        pc, _, _, regs, _ = proc
        reg = self.programs[i].steps[pc].reg
        return self._go_on(i, pc + 1, self._with(regs, reg, which) if reg >= 0 else regs, mem)

    @staticmethod
    def _with(items, i, item):
        return items[:i] + (item,) + items[i + 1 :]

    def _perform(self, i, proc, procs, mem):
        """What the accesses in the window of process `i` lead to that may be performed next."""
        window = proc[4]
        seen = set()
        for number, (cell, value, load) in enumerate(window):
            if cell not in seen and (not load or mem[cell] == value):
                rest = window[:number] + window[number + 1 :]
                mem2 = mem if load else self._put(mem, cell, value)
                after, bit = proc[:4] + (rest,), 2 << i
                if not rest:
                    if proc[1] == RUNNING:
                        waiting = proc[2]
                        after, mem2 = self._go_on(i, proc[0], proc[3], mem2)
                        after = after[:2] + (waiting,) + after[3:]
                    procs2 = [p[:2] + (p[2] & ~bit,) + p[3:] if p[1] == RUNNING and p[2] & bit else p for p in procs]
                    after = self._with(tuple(procs2), i, after)
                else:
                    after = self._with(procs, i, after)
                yield (i, f"    {'loads' if load else 'stores'} {self.cell_names[cell]}: {value}"), after, mem2
            if self.memory == "tso":
                break
            seen.add(cell)

    def _events(self, procs, mem, budget):
        halts, early, raises, looks = budget
        for i, (pc, status, _, regs, window) in enumerate(procs):
            if status not in (RUNNING, ASLEEP):
                continue
            program = self.programs[i]
            if early and status == ASLEEP:
                after, mem2 = self._wake(i, procs[i], mem)
                yield (i, "    returns early"), self._with(procs, i, after), mem2, (halts, early - 1, raises, looks)
            if halts and self.names[i] in self.mortal and program.steps[pc].kind not in ("claim", "end"):
                halted = (0, HALTED, 0, (), window)
                yield (i, "    KILLED or stopped"), self._with(procs, i, halted), mem, (halts - 1, early, raises, looks)
            if raises and pc in program.handler:
                after, mem2 = self._go_on(i, program.handler[pc], regs, mem, window)
                yield (i, "    EXCEPTION"), self._with(procs, i, after), mem2, (halts, early, raises - 1, looks)

    def _follow(self, state):
        """All (what happens, next state), without the events."""
        procs, mem, budget = state
        for i, proc in enumerate(procs):
            if proc[4]:
                for what, after, mem2 in self._perform(i, proc, procs, mem):
                    yield what, (after, mem2, budget)
            if proc[1] == RUNNING:
                for after, mem2 in self._next(i, state):
                    yield (i, proc[0]), (after, mem2, budget)

    # ------------------------------------------------------------ all of them

    def explore(self):
        """Breadth first through all states, so that the first loss found has (nearly) the shortest trace."""
        if self._tso:
            self._tso.explore()
            self.values = self._tso.values  # most of them; what comes to it later costs a second look at some states
        procs, mem = [], self.start
        for i, program in enumerate(self.programs):
            proc, mem = self._go_on(i, 0, (0,) * len(program.names), mem)
            procs.append(proc)
        first = (tuple(procs), mem, self.budget)
        came = {first: None}
        queue = [first]
        one = {}  # equal parts of states are kept once
        for state in queue:
            steps = list(self._follow(state))
            loss = self._loss(state, bool(steps))
            if loss and not steps:
                steps += self._look_again(state)
                loss = "" if steps else loss
            if loss:
                return Result(len(came), loss, self._trace(came, state))
            procs, mem, budget = state
            if any(budget[:3]):
                steps += ((what, state) for what, *state in self._events(procs, mem, budget))
            for what, (after, mem2, budget2) in steps:
                if (after, mem2, budget2) not in came:
                    mem2 = one.setdefault(mem2, mem2)
                    after = tuple([one.setdefault(proc, proc) for proc in after])
                    new = (after, mem2, budget2)
                    came[new] = (state, what)
                    queue.append(new)
                    if mem2 is not mem:
                        for number, value in enumerate(mem2):
                            if value not in self.values[number]:
                                self.values[number].add(value)
                                queue += self.guessed[number]
                                self.guessed[number] = {}
        return Result(len(came), "", [])

    def _look_again(self, state):
        """What follows when all that sleep look again, if somebody was killed: one step, or none."""
        procs, mem, (*events, looks) = state
        if not looks or events[0] == self.budget[0]:
            return
        who = -1
        for i, proc in enumerate(procs):
            if proc[1] == ASLEEP:
                who = i
                woken, mem = self._wake(i, proc, mem)
                procs = self._with(procs, i, woken)
        if who >= 0:
            yield (who, "    and all that sleep LOOK AGAIN"), (procs, mem, (*events, looks - 1))

    def _loss(self, state, moves):
        procs, mem, _ = state
        if any(load for proc in procs for _, _, load in proc[4]):
            return ""  # a guess is open yet, or is wrong for ever
        torn = mem[self.cells["torn"]]
        if torn:
            return f"torn: {self.names[torn - 1]} has copied what is not the message"
        if moves:
            return ""
        cell = dict(zip(self.cell_names, mem))  # the last one of an array, which nobody asks for

        def halted(role):
            return not self.budget[3] and cell.get(role, 0) and procs[cell[role] - 1][1] == HALTED

        for i, (pc, status, _, regs, _) in enumerate(procs):
            kind = self.programs[i].steps[pc].kind
            if status == RUNNING and kind not in ("claim", "end"):
                return f"stuck: {self.names[i]} waits for ever at {kind}"
            if status != ASLEEP:
                continue
            if self.names[i].startswith("reader"):
                for lane in range(2):
                    written, own = cell.get(f"write_pos{lane}", 0), f"read_pos{lane}_{self.names[i][-1]}"
                    read = cell.get(own, cell.get(f"read_pos{lane}", 0))
                    if cell.get(f"acked{lane}", 0) > read or written > read and not halted(f"writer{lane}"):
                        return f"lost: {self.names[i]} sleeps, lane {lane} is written to {written} and read to {read}"
            else:
                lane = self.names[i][6]
                wanted = regs[self.programs[i].names["wanted"]]
                joined = [name[7:] for name in cell if name.startswith("joined_")]
                joined = [who for who in joined if f"read_pos{lane}_{who}" in cell]  # not where readers compete
                if joined:  # all that are there count
                    there = [who for who in joined if cell["joined_" + who] % 2]
                    read = min((cell[f"read_pos{lane}_{who}"] for who in there), default=wanted)
                    freed = min((cell.get(f"freed{lane}_{who}", 0) for who in there), default=0)
                    dead = any(halted("reader_" + who) for who in joined)
                else:
                    read, freed, dead = cell[f"read_pos{lane}"], cell.get(f"freed{lane}", 0), halted("reader")
                if freed >= wanted or read >= wanted and not dead:
                    return f"lost: {self.names[i]} sleeps until lane {lane} is read to {wanted}; it is read to {read}"
        return ""

    def _trace(self, came, state):
        trace = []
        while came[state]:
            state, (i, what) = came[state]
            what = what if isinstance(what, str) else self.programs[i].steps[what].text
            trace.append(f"{self.names[i]:10} {what}")
        return trace[::-1]
