use super::*;
use crate::shm::testing::leaked;
use zerocopy::FromZeros;

const GIVER: NodeId = NodeId(0);
const TAKER: NodeId = NodeId(1);

fn shares(nodes: &[(u64, u32)]) -> Vec<NodeShare> {
    let share = |(pieces, room): &(u64, u32)| NodeShare {
        memory: pieces * LARGE_PAGE_SIZE,
        room: *room,
        ..NodeShare::new_zeroed()
    };
    nodes.iter().map(share).collect()
}

fn map(nodes: &[(u64, u32)]) -> PieceMap {
    let shares = shares(nodes);
    let geometry = MapGeometry::of(&shares);
    let bytes = geometry.size().expect("legal");
    let map = PieceMap::new(leaked(bytes / 64), geometry).expect("large enough");
    map.lay_out(&shares);
    map
}

fn at(map: &PieceMap, piece: usize) -> Option<HostPiece> {
    map.look(piece).expect("sound").host()
}

#[test]
fn at_boot_the_nodes_shares_follow_each_other() {
    let map = map(&[(2, 3), (0, 1), (1, 1)]);
    let places = [(0, 0), (0, 1), (2, 0)].map(|(node, number)| {
        let node = NodeId(node);
        Some(HostPiece { node, number })
    });
    assert_eq!([0, 1, 2].map(|piece| at(&map, piece)), places);
    assert_eq!([0, 1, 2].map(|node| map.free(NodeId(node))), [1, 1, 0]);
    assert_eq!(map.look(3), Err(PieceError::NoSuchPiece { piece: 3 }));
    assert_eq!(map.pieces_on(NodeId(0)).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(map.pieces_on(NodeId(1)).count(), 0);
    assert_eq!(map.take_host(NodeId(2), 0), None, "not beyond its room");
    assert_eq!(map.take_host(NodeId(3), 0), None, "no such node");
}

#[test]
fn a_piece_that_has_moved_leaves_its_place_free() {
    let map = map(&[(2, 2), (0, 1)]);
    let claim = map.claim(1, TAKER).expect("sound").expect("free");
    assert_eq!(map.claim(1, TAKER), Ok(None), "one at a time");
    assert_eq!(at(&map, 1), Some(claim.from()));
    let to = map.take_host(TAKER, 1).expect("room");
    assert_eq!(map.take_host(TAKER, 0), None, "no more");
    assert_eq!(map.free(GIVER), 0);
    assert!(map.publish(&claim, to));
    assert_eq!(at(&map, 1), Some(to));
    assert_eq!(map.free(GIVER), 1);
    assert!(!map.publish(&claim, to), "once");
}

#[test]
fn a_piece_comes_and_goes() {
    let map = map(&[(2, 2), (0, 1)]);
    let claim = map.claim(0, GIVER).expect("sound").expect("free");
    assert!(map.remove(&claim));
    assert_eq!(at(&map, 0), None);
    assert_eq!(map.claim(0, GIVER), Ok(None), "it is absent");
    let to = map.take_host(TAKER, 0).expect("room");
    let taken = at(&map, 1).expect("there");
    assert!(!map.add(0, taken), "another's place");
    assert!(map.add(0, to));
    assert_eq!(at(&map, 0), Some(to));
    assert!(!map.add(0, to), "it is there");
}

#[test]
fn what_has_been_read_before_a_move_and_back_is_read_again() {
    let map = map(&[(1, 2)]);
    let seen = map.look(0).expect("sound");
    assert!(map.is_still(0, seen));
    let claim = map.claim(0, GIVER).expect("sound").expect("free");
    assert!(!map.is_still(0, seen));
    map.release(&claim);
    assert_eq!(map.look(0).map(Seen::host), Ok(seen.host()));
    assert!(!map.is_still(0, seen));
}

#[test]
fn who_is_put_out_has_claimed_nothing() {
    let map = map(&[(3, 3), (0, 3)]);
    let claim = |piece, by| map.claim(piece, by).expect("sound").expect("free");
    let (one, two) = (claim(0, TAKER), claim(1, GIVER));
    let home = one.from();
    map.forget(TAKER);
    assert_eq!(
        map.look(0).map(Seen::whereabouts),
        Ok(Whereabouts::At(home))
    );
    let to = map.take_host(TAKER, 0).expect("room");
    assert!(!map.publish(&one, to), "too late");
    assert!(!map.remove(&one));
    map.release(&one);
    assert_eq!(at(&map, 0), Some(home));
    map.release(&two);
    assert_eq!(map.pieces_on(TAKER).count(), 0);
}

#[test]
fn words_of_garbage_are_errors_and_may_be_anywhere() {
    let shares = shares(&[(2, 2), (0, 2)]);
    let geometry = MapGeometry::of(&shares);
    let words = leaked(geometry.size().expect("legal") / 64);
    let map = PieceMap::new(words, geometry).expect("large enough");
    map.lay_out(&shares);
    let mut random = 1_u64;
    for _ in 0..20_000 {
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        let garbage = random.rotate_left(21) & random;
        words.store(geometry.first_piece(), garbage, Ordering::Relaxed);
        match map.look(0) {
            Ok(seen) => {
                let inside = |host: HostPiece| host.node.0 < 2 && host.number < 2;
                assert!(seen.host().is_none_or(inside), "{garbage:#x}");
            }
            Err(why) => {
                let found = garbage;
                assert_eq!(why, PieceError::Corrupt { piece: 0, found });
                assert!(map.pieces_on(TAKER).any(|piece| piece == 0));
                assert_eq!(map.claim(0, TAKER), Err(why));
            }
        }
        map.forget(GIVER);
        map.forget(TAKER);
    }
}

#[test]
fn impossible_geometries_are_refused() {
    let good = MapGeometry {
        pieces: 4,
        nodes: 2,
        host_pieces: 4,
    };
    assert_eq!(good.size(), Some((2 * 8 + 8 + 2 * 4 * 2) * 8));
    for bad in [
        MapGeometry { pieces: 0, ..good },
        MapGeometry { nodes: 0, ..good },
        MapGeometry { nodes: 65, ..good },
        MapGeometry {
            pieces: usize::MAX,
            ..good
        },
        MapGeometry {
            host_pieces: usize::MAX,
            ..good
        },
    ] {
        assert_eq!(bad.size(), None, "{bad:?}");
    }
    assert!(PieceMap::new(leaked(4), good).is_none(), "too small");
}
