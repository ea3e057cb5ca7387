package union

import (
	"slices"
	"sync"
	"sync/atomic"

	"lamina/state"
)

// Node is one object of the union for its whole life: the same before and after copy-up, under every name it has.
type Node struct {
	fs   *FS
	id   uint64
	ino  uint64
	mode uint32 // type bits only
	key  key    // zero: not shared between names

	// cu is held while the node's upper object is being prepared, so that it is prepared once.
	cu sync.Mutex

	// Guarded by FS.tree.
	upper    bool
	upIno    uint64     // inode number of the upper object
	byName   bool       // found by its name: nothing on disk leads from its upper object to the lower one
	several  bool       // a lower file with several names, all of which are this node (index=on)
	indexed  bool       // the upper object also has a name in the index, and is reached by it
	delta    int64      // indexed: names of the union minus links of the upper inode
	absolute bool       // indexed: the count is stored as a number, see index.go
	stack    []lowerRef // directories: what is merged, topmost first; files: where the data lies
	lpath    string     // where the lower counterpart is found from the roots of the lower layers
	bare     bool       // stack[0] has no extended attributes
	xwh      bool       // directory whose upper part may hold whiteouts that are regular files
	redir    bool       // the upper object carries an absolute overlay.redirect
	dead     bool       // no name is left; changed with mu held too, so that either lock will do for reading
	unborn   bool       // dead because it has no name yet (O_TMPFILE)
	detached bool       // dead because its names lead to another node now, whatever the kernel still believes
	last     Attr       // what stat said when it died, or when it was made
	unsyncd  bool       // the name in the upper layer came by copy-up and was not yet synced

	// Guarded by nodeTable. For directories links has one entry and changes only with tree held for writing.
	links []link
	refs  int64 // the kernel's
	pins  int64 // by children, and by bytes not yet settled
	kids  map[string]*Node

	mu     sync.Mutex
	opens  int
	held   bool    // pinned, because its content is open
	target string  // of a dead symbolic link
	kept   *keeper // dead, but it can be opened until the node goes
	cur    atomic.Pointer[content]
	sketch bool  // while closed: the upper object is a sketch
	size   int64 // while closed, of a sketch: logical size
	aux    any

	list      atomic.Pointer[listing]
	privClean atomic.Bool // the upper object is known to carry neither set-id bits nor capabilities
	nodeMemory
	noCaps   atomic.Bool              // the upper object is known to carry no capabilities
	heritage atomic.Pointer[heritage] // of a directory; changes with tree held for reading, is asked with it held for writing
}

// lowerRef is an object of a lower layer.
type lowerRef struct {
	layer  int32
	xwh    bool // directory that may hold whiteouts that are regular files
	sketch bool // regular file whose data lies, in part, in the next one of the stack
	path   string
}

// link is one name of a node.
type link struct {
	dir  *Node
	name string
}

// key identifies a file that may be reached by several names: the inode that its st_ino comes from.
type key struct{ fs, ino uint64 }

// ID is the node's number for the kernel. The root's is 1.
func (n *Node) ID() uint64 { return n.id }

// Ino is the union's inode number.
func (n *Node) Ino() uint64 { return n.ino }

// Mode gives the type bits (S_IFMT).
func (n *Node) Mode() uint32 { return n.mode }

// Aux holds what the storey above keeps per node; it is that storey's to guard.
func (n *Node) Aux() any     { return n.aux }
func (n *Node) SetAux(a any) { n.aux = a }

// nodeTable finds the live nodes. Its mutex guards byKey and every Node's links, refs, pins and kids.
type nodeTable struct {
	tab      sync.Mutex
	byID     sync.Map // uint64 -> *Node
	byKey    map[key]*Node
	lastID   uint64
	live     int
	state    *state.Arena
	reviving state.Rec // the record that the next node to be registered has already
	unkept   []unkept  // of nodes that are gone; closed by whoever lets go of tab
}

func (t *nodeTable) init() { t.byKey = map[key]*Node{} }

// register gives a new node its number. The caller holds tab, or nobody else knows the node.
func (t *nodeTable) register(n *Node) {
	if r := t.reviving; !r.None() {
		n.id, n.rec = state.As[nodeRec](r).id, r
	} else {
		t.lastID++
		n.id = t.lastID
		if t.state != nil {
			n.writeDown(t.state)
		}
	}
	t.live++
	t.byID.Store(n.id, n)
	if n.key != (key{}) && t.byKey[n.key] == nil {
		t.byKey[n.key] = n
	}
}

// Root is the union's root directory.
func (fs *FS) Root() *Node { return fs.root }

// Node finds a live node by the number the kernel knows it by; nil if there is none.
func (fs *FS) Node(id uint64) *Node {
	n, _ := fs.byID.Load(id)
	node, _ := n.(*Node)
	return node
}

// Live counts the nodes that the kernel or an unsettled file holds.
func (fs *FS) Live() int {
	fs.tab.Lock()
	defer fs.tab.Unlock()
	return fs.live
}

// Forget gives back nlookup of the kernel's references.
func (fs *FS) Forget(id uint64, nlookup uint64) {
	n := fs.Node(id)
	if n == nil {
		return
	}
	fs.tab.Lock()
	n.addRefs(-int64(nlookup))
	fs.collect(n)
	gone := fs.takeUnkept()
	fs.tab.Unlock()
	fs.closeUnkept(gone)
}

// collect removes a node that nobody holds, and then the parents that only it held. The caller holds tab.
func (fs *FS) collect(n *Node) {
	for n != nil && n != fs.root && n.refs <= 0 && n.pins == 0 && n.id != 0 {
		fs.byID.Delete(n.id)
		id := n.id
		n.id = 0
		fs.live--
		fs.unshare(n)
		if k := n.kept; k != nil {
			fs.unkept = append(fs.unkept, unkept{k.fd, n.cur.Swap(nil), id})
			n.kept = nil
		}
		n.strikeAll()
		links := n.links
		n.links = nil
		n.list.Store(nil)
		var next *Node
		for i, l := range links {
			if l.dir.kids[l.name] == n {
				delete(l.dir.kids, l.name)
			}
			l.dir.pins--
			if i == 0 {
				next = l.dir
			} else {
				fs.collect(l.dir)
			}
		}
		n = next
	}
}

func (fs *FS) pin(n *Node) {
	fs.tab.Lock()
	n.pins++
	fs.tab.Unlock()
}

func (fs *FS) unpin(n *Node) {
	fs.tab.Lock()
	n.pins--
	fs.collect(n)
	gone := fs.takeUnkept()
	fs.tab.Unlock()
	if len(gone) > 0 {
		go fs.closeUnkept(gone) // the caller holds the lock of a file, or is the one that a commit waits for
	}
}

// addLink records a name. The caller holds tab.
func (n *Node) addLink(dir *Node, name string) {
	if l := (link{dir, name}); n.attach(l) && n.fs.reviving.None() {
		n.writeName(l)
	}
}

// attach is addLink without writing the name down; false if the node has it already.
func (n *Node) attach(l link) bool {
	if slices.Contains(n.links, l) {
		return false
	}
	n.links = append(n.links, l)
	l.dir.pins++
	if isDir(n.mode) || n.byName {
		if l.dir.kids == nil {
			l.dir.kids = map[string]*Node{}
		}
		l.dir.kids[l.name] = n
	}
	return true
}

// dropLink forgets a name. The caller holds tab.
func (n *Node) dropLink(dir *Node, name string) {
	i := slices.Index(n.links, link{dir, name})
	if i < 0 {
		return
	}
	n.links = slices.Delete(n.links, i, i+1)
	n.strikeOut(i)
	if dir.kids[name] == n {
		delete(dir.kids, name)
	}
	dir.pins--
	n.fs.collect(dir)
}

// dropLinks forgets every name of a node, and the node as the one that its key stands for.
func (fs *FS) dropLinks(n *Node) []Name {
	fs.tab.Lock()
	defer fs.tab.Unlock()
	names := make([]Name, 0, len(n.links))
	for len(n.links) > 0 {
		l := n.links[0]
		names = append(names, Name{Dir: l.dir.id, Name: l.name})
		n.dropLink(l.dir, l.name)
	}
	fs.unshare(n)
	return names
}

// unshare makes other names stop finding n by its key. The caller holds tab.
func (fs *FS) unshare(n *Node) {
	if fs.byKey[n.key] == n {
		delete(fs.byKey, n.key)
	}
}

// moveLink replaces a name by another.
func (fs *FS) moveLink(n, oldDir *Node, oldName string, newDir *Node, newName string) {
	fs.tab.Lock()
	defer fs.tab.Unlock()
	n.addLink(newDir, newName)
	n.dropLink(oldDir, oldName)
}

// firstLink returns one name of the node.
func (fs *FS) firstLink(n *Node) (link, bool) {
	fs.tab.Lock()
	defer fs.tab.Unlock()
	if len(n.links) == 0 {
		return link{}, false
	}
	return n.links[0], true
}

// path is where a directory lies, counted from the root of the union and of the upper layer. The caller holds tree.
func (n *Node) path() string {
	size := 0
	for d := n; d != n.fs.root && len(d.links) > 0; d = d.links[0].dir {
		size += len(d.links[0].name) + 1
	}
	if size == 0 {
		return ""
	}
	buf := make([]byte, size-1)
	at := len(buf)
	for d := n; d != n.fs.root && len(d.links) > 0; d = d.links[0].dir {
		name := d.links[0].name
		at -= len(name)
		copy(buf[at:], name)
		if at > 0 {
			at--
			buf[at] = '/'
		}
	}
	return string(buf)
}
