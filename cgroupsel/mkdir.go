package cgroupsel

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// mkdirProgram selects a new cgroup before a process can be in it. What it
// does is picker.child, one level down from the parent:
//
//	v = sel[parent], or mask 0
//	the path is a plain one      → v is that one's
//	else a glob or unit matches  → v is that one's, unless v is of a plain path or an earlier selection
//	else, if v has mask 0        → v is that of the plain path above, if there is one
//
// The last line is for a parent that the map had no room for.
func mkdirProgram(m *maps, l *layout) *ebpf.ProgramSpec {
	ins := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R1, 0, asm.DWord), // struct cgroup *
		asm.LoadMem(asm.R8, asm.R1, 8, asm.DWord), // its path
	}
	ins = append(ins, unifiedOnly(l)...)
	ins = append(ins, asm.StoreMem(asm.RFP, slotID, asm.R7, asm.DWord))
	ins = append(ins, parentID(l)...)
	ins = append(ins, inherit(m)...)
	ins = append(ins, readPath(m)...)
	if m.globs != nil {
		ins = append(ins, matchGlobs(m)...)
	}
	ins = append(ins, lookupPath(m)...)
	ins = append(ins,
		asm.LoadMem(asm.R1, asm.RFP, slotValue+valueMask, asm.Word).WithSymbol("put"),
		asm.JEq.Imm(asm.R1, 0, "out"),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, slotValue),
		asm.Mov.Imm(asm.R4, 0),
	)
	ins = append(ins, mapCall(m.sel.FD(), slotID, asm.FnMapUpdateElem)...)
	ins = append(ins, asm.JNE.Imm(asm.R0, 0, "full"))
	ins = append(ins, report(m)...)
	ins = append(ins, asm.Ja.Label("out"))
	ins = append(ins, count(m, countFull, "full")...)
	ins = append(ins, asm.Ja.Label("out"))
	// A path that cannot be read: the parent's word stands.
	ins = append(ins,
		asm.LoadMem(asm.R1, asm.RFP, slotValue+valueMask, asm.Word).WithSymbol("unread"),
		asm.JNE.Imm(asm.R1, 0, "put"),
	)
	ins = append(ins, count(m, countPath, "lost")...)
	return program("cgtun_mkdir", ebpf.RawTracepoint, ebpf.AttachNone, append(ins, leave(0)...))
}

// parentID puts the id of the parent of the cgroup in R6 into slotParent.
// cgroup.self.parent points at the self of the parent.
func parentID(l *layout) asm.Instructions {
	ins := readPointer(asm.R9, asm.R6, l.cgroupSelf+l.cssParent, "lost")
	ins = append(ins,
		asm.JEq.Imm(asm.R9, 0, "out"),
		asm.Add.Imm(asm.R9, -l.cgroupSelf),
	)
	ins = append(ins, readID(l, asm.R1, asm.R9)...)
	return append(ins, asm.StoreMem(asm.RFP, slotParent, asm.R1, asm.DWord))
}

// copyValue copies the value that R0 points at into slotValue: the helpers get
// a copy, as an entry can be deleted under them.
func copyValue() asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R1, asm.R0, 0, asm.DWord),
		asm.StoreMem(asm.RFP, slotValue, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.R0, 8, asm.DWord),
		asm.StoreMem(asm.RFP, slotValue+8, asm.R1, asm.DWord),
	}
}

// inherit makes slotValue the parent's, or all zero. Below a cgroup that is
// exempt, too, the path decides.
func inherit(m *maps) asm.Instructions {
	ins := asm.Instructions{
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.RFP, slotValue, asm.R1, asm.DWord),
		asm.StoreMem(asm.RFP, slotValue+8, asm.R1, asm.DWord),
	}
	ins = append(ins, mapCall(m.sel.FD(), slotParent, asm.FnMapLookupElem)...)
	ins = append(ins, asm.JEq.Imm(asm.R0, 0, "path"))
	ins = append(ins, copyValue()...)
	return append(ins,
		asm.LoadMem(asm.R1, asm.RFP, slotValue+valueFlags, asm.Word),
		asm.And.Imm(asm.R1, ^int32(flagTop|flagRival)),
		asm.StoreMem(asm.RFP, slotValue+valueFlags, asm.R1, asm.Word),
	)
}

// readPath reads the path in R8 into the trie key that R9 points at then, and
// its length with the NUL into slotLength. Its first instruction is "path". A
// longer path is cut.
func readPath(m *maps) asm.Instructions {
	ins := asm.Instructions{
		asm.Mov.Imm(asm.R1, 0).WithSymbol("path"),
		asm.StoreMem(asm.RFP, slotIndex, asm.R1, asm.Word),
	}
	ins = append(ins, mapCall(m.scratch.FD(), slotIndex, asm.FnMapLookupElem)...)
	return append(ins,
		asm.JEq.Imm(asm.R0, 0, "unread"),
		asm.Mov.Reg(asm.R9, asm.R0),
		asm.Mov.Reg(asm.R1, asm.R9),
		asm.Add.Imm(asm.R1, 4),
		asm.Mov.Imm(asm.R2, pathBytes),
		asm.Mov.Reg(asm.R3, asm.R8),
		asm.FnProbeReadKernelStr.Call(),
		asm.JSLE.Imm(asm.R0, 0, "unread"),
		asm.StoreMem(asm.RFP, slotLength, asm.R0, asm.DWord),
	)
}

// matchGlobs runs the automaton over the path in R9's key and puts what
// matches into slotValue. R6 is the byte it is at, R7 the row, R8 the table.
func matchGlobs(m *maps) asm.Instructions {
	ins := mapCall(m.globs.FD(), slotIndex, asm.FnMapLookupElem)
	ins = append(ins,
		asm.JEq.Imm(asm.R0, 0, "plain"),
		asm.Mov.Reg(asm.R8, asm.R0),
		asm.Mov.Imm(asm.R6, 0),
		asm.Mov.Imm(asm.R7, m.start),
		// The verifier counts R6, and so sees an end.
		asm.JGE.Imm(asm.R6, pathBytes, "matched").WithSymbol("byte"),
		asm.Mov.Reg(asm.R1, asm.R9),
		asm.Add.Reg(asm.R1, asm.R6),
		asm.LoadMem(asm.R2, asm.R1, 4, asm.Byte),
		asm.JEq.Imm(asm.R2, 0, "matched"),
		asm.Mov.Reg(asm.R1, asm.R8),
		asm.Add.Reg(asm.R1, asm.R2),
		asm.LoadMem(asm.R3, asm.R1, 0, asm.Byte),
		asm.Add.Reg(asm.R7, asm.R3),
		asm.And.Imm(asm.R7, maxCells-1),
	)
	ins = append(ins, cell(asm.R7)...)
	ins = append(ins,
		asm.JEq.Imm(asm.R7, 0, "plain"),
		asm.Add.Imm(asm.R6, 1),
		asm.Ja.Label("byte"),
		// Nothing is known of a path that was cut while it might still match.
		asm.LoadMem(asm.R1, asm.RFP, slotLength, asm.DWord).WithSymbol("matched"),
		asm.JGE.Imm(asm.R1, pathBytes, "unread"),
	)
	ins = append(ins, cell(asm.R6)...) // the label
	return append(append(ins, asm.JEq.Imm(asm.R6, 0, "plain")), prefer(m)...)
}

// cell loads the cell that R7 is the offset of.
func cell(dst asm.Register) asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R7),
		asm.LSh.Imm(asm.R1, 1),
		asm.Add.Reg(asm.R1, asm.R8),
		asm.LoadMem(dst, asm.R1, classBytes, asm.Half),
	}
}

// prefer puts the value of the selection with the label in R6 into slotValue
// if it comes before the one that is there.
func prefer(m *maps) asm.Instructions {
	ins := asm.Instructions{
		asm.Sub.Imm(asm.R6, 1),
		asm.LoadMem(asm.R1, asm.RFP, slotValue+valueMask, asm.Word),
		asm.JEq.Imm(asm.R1, 0, "take"),
		asm.LoadMem(asm.R1, asm.RFP, slotValue+valueSelection, asm.Word),
		asm.JEq.Reg(asm.R1, asm.R6, "plain"),
		asm.LoadMem(asm.R2, asm.RFP, slotValue+valueFlags, asm.Word),
		asm.Or.Imm(asm.R2, flagRival),
		asm.StoreMem(asm.RFP, slotValue+valueFlags, asm.R2, asm.Word),
		asm.And.Imm(asm.R2, flagPlain),
		asm.JNE.Imm(asm.R2, 0, "plain"),
		asm.JLT.Reg(asm.R1, asm.R6, "plain"),
		asm.Mov.Imm(asm.R7, flagRival),
		asm.Ja.Label("value"),
		asm.Mov.Imm(asm.R7, 0).WithSymbol("take"),
		asm.StoreMem(asm.RFP, slotIndex, asm.R6, asm.Word).WithSymbol("value"),
	}
	ins = append(ins, mapCall(m.marks.FD(), slotIndex, asm.FnMapLookupElem)...)
	ins = append(ins,
		asm.JEq.Imm(asm.R0, 0, "plain"),
		asm.LoadMem(asm.R1, asm.R0, valueMask, asm.Word),
		asm.JEq.Imm(asm.R1, 0, "plain"), // a way that is followed for nobody
	)
	ins = append(ins, copyValue()...)
	return append(ins,
		asm.LoadMem(asm.R1, asm.RFP, slotValue+valueFlags, asm.Word),
		asm.Or.Reg(asm.R1, asm.R7),
		asm.Or.Imm(asm.R1, flagTop),
		asm.StoreMem(asm.RFP, slotValue+valueFlags, asm.R1, asm.Word),
	)
}

// lookupPath looks the key that R9 points at up in the trie, with a slash at
// its end. Its first instruction is "plain".
func lookupPath(m *maps) asm.Instructions {
	ins := asm.Instructions{
		// The slash goes where the NUL is. The trie's own paths are shorter
		// than one that was cut, so they still match it.
		asm.LoadMem(asm.R6, asm.RFP, slotLength, asm.DWord).WithSymbol("plain"),
		asm.Mov.Reg(asm.R0, asm.R6),
		asm.Sub.Imm(asm.R0, 1),
		asm.And.Imm(asm.R0, pathBytes-1),
		asm.Mov.Reg(asm.R1, asm.R9),
		asm.Add.Reg(asm.R1, asm.R0),
		asm.Mov.Imm(asm.R2, '/'),
		asm.StoreMem(asm.R1, 4, asm.R2, asm.Byte),
		asm.LSh.Imm(asm.R6, 3),
		asm.StoreMem(asm.R9, 0, asm.R6, asm.Word),
		asm.LoadMapPtr(asm.R1, m.paths.FD()),
		asm.Mov.Reg(asm.R2, asm.R9),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "put"),
		asm.LoadMem(asm.R1, asm.R0, pathValueBits, asm.Word),
		asm.JEq.Reg(asm.R1, asm.R6, "exact"),
		asm.LoadMem(asm.R1, asm.RFP, slotValue+valueMask, asm.Word),
		asm.JNE.Imm(asm.R1, 0, "put"),
	}
	ins = append(ins, copyValue()...)
	ins = append(ins, asm.Ja.Label("put"))
	exact := copyValue()
	exact[0] = exact[0].WithSymbol("exact")
	ins = append(ins, exact...)
	return append(ins,
		asm.LoadMem(asm.R1, asm.RFP, slotValue+valueFlags, asm.Word),
		asm.Or.Imm(asm.R1, flagTop),
		asm.StoreMem(asm.RFP, slotValue+valueFlags, asm.R1, asm.Word),
	)
}

// report wakes Run if what has just been selected is of interest to it.
func report(m *maps) asm.Instructions {
	return append(asm.Instructions{
		asm.LoadMem(asm.R1, asm.RFP, slotValue+valueFlags, asm.Word),
		asm.And.Imm(asm.R1, flagTop|flagRival),
		asm.JEq.Imm(asm.R1, 0, "out"),
	}, wake(m)...)
}

// wake writes slotID to the news. If there is no room Run has not even read
// the older ones, and will look.
func wake(m *maps) asm.Instructions {
	return asm.Instructions{
		asm.LoadMapPtr(asm.R1, m.news.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, slotID),
		asm.Mov.Imm(asm.R3, 8),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnRingbufOutput.Call(),
	}
}

// releaseProgram forgets a cgroup when its last socket has gone, which can be
// long after rmdir.
func releaseProgram(m *maps, l *layout) *ebpf.ProgramSpec {
	ins := asm.Instructions{asm.LoadMem(asm.R6, asm.R1, 0, asm.DWord)}
	ins = append(ins, unifiedOnly(l)...)
	ins = append(ins, asm.StoreMem(asm.RFP, slotID, asm.R7, asm.DWord))
	ins = append(ins, mapCall(m.sel.FD(), slotID, asm.FnMapDeleteElem)...)
	ins = append(ins, asm.JNE.Imm(asm.R0, 0, "out"))
	ins = append(ins, wake(m)...)
	ins = append(ins, asm.Ja.Label("out"))
	ins = append(ins, count(m, countPath, "lost")...)
	return program("cgtun_release", ebpf.RawTracepoint, ebpf.AttachNone, append(ins, leave(0)...))
}
