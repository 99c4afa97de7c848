// What is done with the bytes of a link. Shared by the fuzz target and the corpus test, by `include!`.

use bytes::Bytes;
use kvferry_core::wire::{Frame, FrameReader, PROTOCOL_MAX, decode_from, decode_message, encode_for};

/// Reads `bytes` as a stream of frames; whatever decodes must survive being encoded again.
fn control_frame(bytes: &[u8]) {
    let mut reader = FrameReader::default();
    reader.trust();
    reader.buffer().extend_from_slice(bytes);
    while let Ok(Some(bytes)) = reader.next_frame() {
        let Ok(frame) = Frame::decode(bytes) else { continue };
        let again = frame.encode().ok().and_then(|bytes| Frame::decode(bytes.slice(4..)).ok());
        // A reason is cut to its limit and made valid text; everything else comes back as it was.
        assert!(again.as_ref() == Some(&frame) || matches!(frame, Frame::Reject(_)), "{frame:?} became {again:?}");
        if let Frame::Sealed { body, .. } = frame
            && let Ok(message) = decode_from(&body, PROTOCOL_MAX)
        {
            let again: Option<Bytes> = encode_for(&message, PROTOCOL_MAX).ok();
            let again = again.and_then(|bytes| decode_from(&bytes, PROTOCOL_MAX).ok());
            assert!(again.as_ref() == Some(&message), "{message:?} became {again:?}");
        }
    }
    let _ = decode_message(bytes);
    let _ = decode_from(bytes, PROTOCOL_MAX);
}
