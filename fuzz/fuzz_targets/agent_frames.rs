//! What a guest's agent or a launcher may find in its stream: any bytes must
//! give frames or an error, and what was decoded must encode to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm_shared::agent::{Exec, HEADER_LEN, Message, decode, encode_exec, skip_to_hello};

fuzz_target!(|bytes: &[u8]| {
    let skipped = skip_to_hello(bytes);
    assert!(skipped <= bytes.len());
    assert!(bytes.len() < HEADER_LEN || bytes.len() - skipped >= HEADER_LEN - 1);

    let mut rest = bytes;
    while let Ok(Some((frame, len))) = decode(rest) {
        let mut again = Vec::new();
        frame.encode(&mut again);
        assert_eq!(again, rest[..len]);
        rest = &rest[len..];
        if let Message::Exec(request) = frame.message {
            exec_comes_back(request);
        }
    }
    exec_comes_back(bytes);
});

fn exec_comes_back(bytes: &[u8]) {
    let Ok(exec) = Exec::decode(bytes) else {
        return;
    };
    let argv: Vec<_> = exec.argv.collect();
    let env: Vec<_> = exec.env.collect();
    let mut again = Vec::new();
    encode_exec(&mut again, exec.tty, exec.cwd, &argv, &env).expect("it was accepted");
    assert_eq!(Exec::decode(&again), Ok(exec));
}
